from prelude import *
from prelude import long, some
# -----------------------------------------------------------------------------
# 13. recipes: their own tests, recipes/test_recipes.py, say what they compute


@pytest.mark.parametrize("path", sorted((HERE / "recipes").glob("*.diff")), ids=str)
def test_a_recipe_applies_with_at_most_25_added_lines_and_the_page_has_it(path):
    core = [f"{name}.py" for name in "sft reward ppo data utils hybrid_engine kernels".split()]
    if subprocess.run(["git", "diff", "--quiet", "HEAD", "--", *core], cwd=HERE).returncode:
        pytest.skip("the seven files differ from HEAD: do the recipes still apply?")
    subprocess.run(["git", "apply", "--check", path], cwd=HERE, check=True)
    added = re.findall(r"^\+(?!\+\+)(.*)", path.read_text(), re.M)
    assert len(added) <= 25 and max(map(len, added)) <= 100
    assert f"({path.name})" in (HERE / "recipes/README.md").read_text()
