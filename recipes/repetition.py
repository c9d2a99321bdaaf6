"""A process reward, for recipes/process-reward.diff."""


def repetition(completion_ids, **kwargs):
    """-1 for each token that is the one before it."""
    return [[-float(a == b) for a, b in zip([None, *ids], ids)] for ids in completion_ids]
