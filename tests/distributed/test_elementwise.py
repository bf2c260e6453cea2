"""The elementwise kernels, each device with its part, give the results of one device."""

from support.exhaustive import EXHAUSTIVE

U, FINE = 2.0**-8, 2.0**-20  # a rounding to bfloat16; the order of a sum in float32


def test_results_on_four_devices_are_those_of_one(simulate):
    """Exact but for gradients that are sums over tokens: of float32, or of products in bfloat16, rounded on each device
    and together."""
    found = simulate("elementwise.py", devices=4)
    assert len(found) == (11 if EXHAUSTIVE else 1)
    for case, (of_x, *of_weights) in found.items():
        assert of_x == 0, case
        if case.startswith("rows"):
            assert of_weights == [0, 0, 0], case
        assert max(of_weights) <= (4 * U if case.startswith("swiglu") else FINE), case
