"""FLOPs of matrix products as XLA writes them for TPUs: convolutions, with spatial axes for what else is multiplied."""

import re


def _sizes(shape: str) -> list[int]:
    found = re.search(r"\[([\d,]*)\]", shape)
    return [int(size) for size in found[1].split(",") if size] if found else []


def product_flops(line: str, shape: str, lhs_shape: str, kernel_shape: str) -> float:
    """FLOPs of a convolution, from its printed line and the printed shapes of its result and operands."""
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", line)
    if labels is None:
        return 0.0
    (lhs_at, kernel_at, out_at), out = labels.groups(), _sizes(shape)
    lhs, kernel = (_sizes(printed) for printed in (lhs_shape, kernel_shape))
    flops = 2.0 * out[out_at.index("b")] * out[out_at.index("f")] * kernel[kernel_at.index("i")]
    window = dict(re.findall(r"(\w+)=([\d_x]+)", (re.search(r"window=\{([^}]*)\}", line) or [""])[0]))
    for axis in range(len(lhs_at) - 2):
        sizes = (x[at.index(str(axis))] for x, at in ((lhs, lhs_at), (kernel, kernel_at), (out, out_at)))
        flops *= _pairs(
            *sizes, *(_of_window(window, name, axis) for name in ("stride", "pad", "lhs_dilate", "rhs_dilate"))
        )
    return flops


def _of_window(window: dict[str, str], name: str, axis: int) -> int:
    """A number of a convolution's window along a spatial axis; of padding, that in front."""
    default = "0" if name == "pad" else "1"
    return int(window[name].split("x")[axis].split("_")[0] if name in window else default)


def _pairs(lhs: int, kernel: int, out: int, stride: int, pad: int, lhs_dilate: int, rhs_dilate: int) -> int:
    """How often an element of the kernel meets one of the input, and not padding or a hole, along a spatial axis."""
    places = (o * stride + k * rhs_dilate - pad for o in range(out) for k in range(kernel))
    return sum(0 <= place <= (lhs - 1) * lhs_dilate and place % lhs_dilate == 0 for place in places)
