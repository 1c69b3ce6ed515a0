"""What growth does to a tensor, with every number written out. The FFN computes down_proj @ act(up_proj @ x)."""

from tiny import DOWN, UP, tiny_checkpoint

from incr_ds.config.growth import GrowthRecipe
from incr_ds.growth.apply import GrownTensors
from incr_ds.growth.planner import plan_growth
from incr_ds.testing.checkpoint import MemoryCheckpoint

UP_2x3 = [[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]  # one row for each neuron
DOWN_3x2 = [[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]  # one column for each neuron
EQUAL = {"method": "none"}  # copies stay equal, so that the numbers can be read


def grown(source: MemoryCheckpoint, name: str, recipe: dict, state: str = "weight") -> list:
    plan = plan_growth(source.architecture, GrowthRecipe.model_validate(recipe))
    shape = plan.target.by_name[name].shape
    return GrownTensors(plan, source).read(name, state, tuple((0, size) for size in shape)).tolist()


def test_four_neurons_from_two_by_copies():
    """A copied neuron computes the same, so each of the two copies counts half in the output."""
    source = tiny_checkpoint({UP: UP_2x3, DOWN: DOWN_3x2})
    recipe = {"target": {"intermediate_size": 4}, "width": {"ffn": {"new": "copy"}, "symmetry_breaking": EQUAL}}
    assert grown(source, UP, recipe) == [[1, 2, 3], [4, 5, 6], [1, 2, 3], [4, 5, 6]]
    assert grown(source, DOWN, recipe) == [[0.5, 1, 0.5, 1], [1.5, 2, 1.5, 2], [2.5, 3, 2.5, 3]]


def test_four_neurons_from_two_by_new_ones_that_are_silent():
    """New neurons read at random and write nothing yet."""
    source = tiny_checkpoint({UP: UP_2x3, DOWN: DOWN_3x2})
    recipe = {"target": {"intermediate_size": 4}, "width": {"ffn": {"new": "zero-output"}, "symmetry_breaking": EQUAL}}
    assert grown(source, UP, recipe)[:2] == [[1, 2, 3], [4, 5, 6]]
    assert grown(source, DOWN, recipe) == [[1, 2, 0, 0], [3, 4, 0, 0], [5, 6, 0, 0]]


def test_a_residual_stream_of_six_from_three():
    """Writers write each position twice. Readers read both copies, each with half the weight."""
    source = tiny_checkpoint({UP: UP_2x3, DOWN: DOWN_3x2})
    recipe = {"target": {"hidden_size": 6}, "width": {"hidden": "integer", "symmetry_breaking": EQUAL}}
    assert grown(source, UP, recipe) == [[0.5, 1, 1.5, 0.5, 1, 1.5], [2, 2.5, 3, 2, 2.5, 3]]
    assert grown(source, DOWN, recipe) == [[1, 2], [3, 4], [5, 6], [1, 2], [3, 4], [5, 6]]


def test_moments_of_copied_neurons():
    """A copy's gradient of up_proj is half the source's (its output counts half), and that of down_proj is the source's."""
    source = tiny_checkpoint({UP: UP_2x3, DOWN: DOWN_3x2})
    recipe = {"target": {"intermediate_size": 4}, "width": {"ffn": {"new": "copy"}, "symmetry_breaking": EQUAL}}
    assert grown(source, UP, recipe, "exp_avg") == [[0.5, 1, 1.5], [2, 2.5, 3], [0.5, 1, 1.5], [2, 2.5, 3]]
    assert grown(source, UP, recipe, "exp_avg_sq")[0] == [0.25, 0.5, 0.75], "the square of the factor"
    assert grown(source, DOWN, recipe, "exp_avg") == [[1, 2, 1, 2], [3, 4, 3, 4], [5, 6, 5, 6]]


def test_four_layers_from_two():
    """Each layer is followed by an inserted one: a copy whose last matrix is zero, so that it adds nothing yet."""
    source = tiny_checkpoint({UP.replace("0", "1"): UP_2x3, DOWN.replace("0", "1"): DOWN_3x2}, layers=2)
    recipe = {"target": {"num_hidden_layers": 4}, "depth": {"method": "interleave", "new": "zero-output"}}
    ones, zeros = [[1, 1], [1, 1], [1, 1]], [[0, 0], [0, 0], [0, 0]]
    found = [grown(source, DOWN.replace("0", str(layer)), recipe) for layer in range(4)]
    assert found == [ones, zeros, DOWN_3x2, zeros]
    found = [grown(source, UP.replace("0", str(layer)), recipe) for layer in range(4)]
    assert found == [[[1, 1, 1], [1, 1, 1]]] * 2 + [UP_2x3] * 2
