"""Stanford Human Preferences (Ethayarajh et al. 2022): Reddit posts with two comments each.

    python reward.py --model out/sft --data recipes/shp.py:shp --out out/reward-shp
"""
import data

SOURCE = "stanfordnlp/SHP"  # on the hub; or a file, such as train.json of one subreddit
MIN_RATIO = 2.0             # of the two comments' votes: below it, preferences are mostly noise


def shp():
    """Yields {prompt, response, chosen, rejected}. The response, for step 1, is the chosen one."""
    for row in data.read(SOURCE):
        if row["score_ratio"] < MIN_RATIO:
            continue
        chosen = row["human_ref_A"]
        rejected = row["human_ref_B"]
        if row["labels"] == 0:  # 1: A has more votes
            chosen, rejected = rejected, chosen
        yield {"prompt": row["history"], "response": chosen, "chosen": chosen, "rejected": rejected}
