"""The portfolio of the recorded pairs: the recipe is what the tables make of it."""

from benchmarks import pair_portfolio
from benchmarks.curves import EVIDENCE
from ekd_ray.config import StudyConfig
from ekd_ray.scale.space import check_space
from ekd_ray.studies.recipes import SEARCH_SPACES, load_recipe


def test_the_recipe_is_made_of_the_tables():
    written = (SEARCH_SPACES / "cifar10-portfolio.yaml").read_text(encoding="utf-8")
    assert pair_portfolio.recipe() == written


def test_its_points_lie_in_its_space_and_have_one_temperature():
    study = StudyConfig.from_dict(load_recipe("cifar10-portfolio"))
    space = check_space(study)
    assert len(study.first_points) == pair_portfolio.SIZE
    for point in study.first_points:
        assert space.searched_part(point) == point
        assert point["temperature"] == point["ekd_temperature"]
    assert study.distill.evidence == EVIDENCE and "evidence" not in space.parameters
