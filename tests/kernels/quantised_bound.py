"""How far what comes back of a quantised chunk may be off: the bound of kernels/quantised.py."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvtier.kernels import quantised_reference as reference
from kvtier.kernels.quantised import scheme_and_record
from kvtier.spaces import Layout

# What one rounding to the type may cost, relative and absolute.
RELATIVE = {"float32": 2.0**-23, "float16": 2.0**-11 + 2.0**-23, "bfloat16": 2.0**-8 + 2.0**-23}
ABSOLUTE = {"float32": 2.0**-148, "float16": 2.0**-25, "bfloat16": 2.0**-134}


def bound(layout: Layout, values: NDArray[Any], chunk: NDArray[np.uint8]) -> NDArray[Any]:
    """How far each element may be off, with the scales that the chunk has.

    `values` are the elements as float64, [layers, 2, heads, tokens, head_dim].
    """
    shape = (layout.layers, layout.heads, layout.tokens, layout.head_dim)
    scheme, record = scheme_and_record(layout)
    records = chunk.reshape(layout.layers, layout.heads, record.nbytes)

    def scales(at: int, count: int) -> NDArray[Any]:
        raw = np.ascontiguousarray(records[..., at : at + 2 * count]).view(np.uint16)
        return reference.widen(raw, "bfloat16").astype(np.float64)

    groups = scheme.groups(layout.tokens)
    keys = scales(record.key_scales, groups * layout.head_dim)
    keys = keys.reshape(*shape[:2], groups, layout.head_dim)
    keys = keys[:, :, np.arange(layout.tokens) // scheme.group_tokens(layout.tokens)]
    of_values = np.broadcast_to(scales(record.value_scales, layout.tokens)[..., None], shape)
    scale = np.stack([keys, of_values], axis=1)
    unit = RELATIVE[layout.dtype]
    result: NDArray[Any] = (0.5 + 2.0**-14) * scale + unit * (abs(values) + scale)
    return result + ABSOLUTE[layout.dtype]
