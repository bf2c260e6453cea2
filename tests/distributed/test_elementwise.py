"""The elementwise kernels, each device with its part, give the gradients of one device."""

from support.exhaustive import exhaustive

U, FINE = 2.0**-8, 2.0**-20  # a rounding to bfloat16; the order of a sum in float32


@exhaustive("kernels/test_elementwise.py: each kernel's gradients, and which part each device computes")
def test_gradients_on_four_devices_are_those_of_one(simulate):
    """Exact but for sums over tokens: of float32, or of products in bfloat16, rounded on each device and together."""
    found = simulate("elementwise.py", devices=4)
    assert len(found) == 6
    for case, (of_x, *of_weights) in found.items():
        assert of_x == 0, case
        assert max(of_weights) <= (4 * U if case.startswith("swiglu") else FINE), case
