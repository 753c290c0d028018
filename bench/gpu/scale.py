"""How much each measurement moves: on a GPU, and in a dry run on the simulated device."""

from dataclasses import dataclass

from kvtier.spaces import Layout

KIB, MIB = 1 << 10, 1 << 20
BLOCK_TOKENS = 16  # of an engine's block


@dataclass(frozen=True, slots=True)
class Style:
    """How an engine's cache holds the chunks of a layout: an array for each layer and plane, with
    these axes."""

    layout: Layout
    axes: str

    @property
    def blocks_per_chunk(self) -> int:
        return -(-self.layout.tokens // BLOCK_TOKENS)


@dataclass(frozen=True, slots=True)
class Scale:
    """Sizes are in bytes; counts are of what their name says.

    `rounds` each time everything once, after one that does not count. `styles` are measured with
    `kernel_chunks` each, in `launches` per timed run. Of a hit, the first of `hit_chunks` is also
    measured in RAM. A decode step is `step_launches` kernels, a timed run `steps` of them.
    """

    rounds: int
    copy_chunks: tuple[int, ...]
    copy_bytes: int
    styles: dict[str, Style]
    kernel_chunks: int
    launches: int
    parts: tuple[int, ...]
    part_layers: int
    part_chunks: int
    most_load_bytes: int
    hit_chunks: tuple[int, ...]
    step_launches: int
    steps: int
    offload_chunk: int
    offload_chunks: int


def _styles(layers: int, heads: int, head_dim: int, tokens: int, latent: int) -> dict[str, Style]:
    """Keys and values apart, tokens or heads outermost in a block, and a latent cache (MLA)."""
    pair = Layout("bfloat16", layers, heads, head_dim, tokens)
    one = Layout("bfloat16", layers, 1, latent, tokens, planes=1)
    return {
        "nhd": Style(pair, "block,token,head,dim"),
        "hnd": Style(pair, "block,head,token,dim"),
        "mla": Style(one, "block,token,dim"),
    }


# Chunks of 32 MiB: Llama 3 8B. What is timed is several times larger than the L2 cache of a GPU.
FULL = Scale(
    rounds=9,
    copy_chunks=(1 * MIB, 8 * MIB, 32 * MIB),
    copy_bytes=512 * MIB,
    styles=_styles(layers=32, heads=8, head_dim=128, tokens=256, latent=576),
    kernel_chunks=8,
    launches=10,
    parts=tuple(4 * KIB << n for n in range(11)),
    part_layers=32,
    part_chunks=8,
    most_load_bytes=256 * MIB,
    hit_chunks=(64, 256),
    step_launches=32,
    steps=20,
    offload_chunk=32 * MIB,
    offload_chunks=16,
)

DRY = Scale(
    rounds=1,
    copy_chunks=(16 * KIB, 64 * KIB),
    copy_bytes=256 * KIB,
    styles=_styles(layers=2, heads=2, head_dim=16, tokens=32, latent=24),
    kernel_chunks=2,
    launches=2,
    parts=(4 * KIB, 16 * KIB, 64 * KIB),
    part_layers=2,
    part_chunks=2,
    most_load_bytes=256 * KIB,
    hit_chunks=(2, 4),
    step_launches=2,
    steps=2,
    offload_chunk=64 * KIB,
    offload_chunks=4,
)
