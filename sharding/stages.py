"""Which layers of a model the stages of a pipeline hold.

A model of L layers is cut into parts in the order of its layers, and part q stands on stage q % p: with several chunks
a stage holds parts that are not neighbours. With 8 layers, 2 stages and 2 chunks:

    layers   0 1   2 3   4 5   6 7
    part     0     1     2     3
    stage    0     1     0     1

Stage 0 keeps the rows 0, 1, 4, 5 of a stacked parameter, in this order: these are its slots.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

from sharding.mesh import Mesh
from sharding.parts import slots

PIPE = "pipe"  # the mesh axis along which stages lie


def stage_count(mesh: Mesh) -> int:
    """How many stages a mesh has: one without an axis for them."""
    return dict(mesh.axes).get(PIPE, 1)


def stage_of(mesh: Mesh, rank: int) -> int:
    """The stage of a device."""
    return mesh.coordinates(rank).get(PIPE, 0)


@dataclass(frozen=True)
class Pipeline:
    """What is chosen for a pipeline: the schedule by its name in schedules.SCHEDULES, the number of chunks of layers
    per stage, and how many layers each stage holds; () is as many on each."""

    schedule: str = "1f1b"
    chunks: int = 1
    stage_layers: tuple[int, ...] = ()


@dataclass(frozen=True)
class Stages:
    """The layers of every part, in the order of the model, dealt to `count` stages in turn."""

    count: int
    sizes: tuple[int, ...]

    def stage(self, part: int) -> int:
        """Where a part stands."""
        return part % self.count

    def part_of(self, layer: int) -> int:
        """The part that holds a layer; ValueError for a layer that there is not."""
        for part, end in enumerate(accumulate(self.sizes)):
            if 0 <= layer < end:
                return part
        raise ValueError(f"layer {layer} is none of the {sum(self.sizes)} that the stages of the pipeline hold")

    def slot_of(self, layer: int) -> int:
        """The row of a layer in what its stage holds of a stacked parameter."""
        part = self.part_of(layer)
        within = layer - sum(self.sizes[:part])
        return sum(self.sizes[self.stage(part) : part : self.count]) + within

    @property
    def slots(self) -> int:
        """Rows of a stacked parameter on every stage: as many as the stage with most layers has."""
        return slots(self.sizes, self.count)


def stages_of(pipeline: Pipeline, count: int, layers: int) -> Stages:
    """The parts of a model of `layers` layers on `count` stages; ValueError with what would do where they do not go."""
    chunks, held = pipeline.chunks, pipeline.stage_layers
    if layers % chunks:
        fitting = [n for n in range(1, layers // count + 1) if layers % n == 0]
        raise ValueError(f"--mesh.chunks={chunks} does not divide {layers} layers; it can be {fitting}")
    parts = count * chunks
    if layers < parts:
        raise ValueError(
            f"{layers} layers are fewer than {count} stages x {chunks} chunks: a part of the model would be empty. Use "
            f"fewer chunks (--mesh.chunks), or at most {max(layers // chunks, 1)} stages (pipe in --mesh.axes)"
        )
    if not held:
        if layers % parts:
            raise ValueError(
                f"{layers} layers do not divide by {count} stages x {chunks} chunks. Give the layers of each stage "
                f"with --mesh.stage_layers={_text(_balanced(layers, count, chunks))}, or change the stages or chunks"
            )
        held = (layers // count,) * count
    wrong = len(held) != count or sum(held) != layers or any(n < chunks or n % chunks for n in held)
    if wrong:
        each = f", each a multiple of {chunks} chunks" if chunks > 1 else ""
        raise ValueError(
            f"--mesh.stage_layers={_text(held)} are {len(held)} numbers whose sum is {sum(held)}; expected one number "
            f"for each of {count} stages, in all {layers} layers{each}, such as "
            f"{_text(_balanced(layers, count, chunks))}"
        )
    return Stages(count, tuple(held[part % count] // chunks for part in range(parts)))


def _balanced(layers: int, count: int, chunks: int) -> tuple[int, ...]:
    """Layers of each stage, as even as whole chunks allow: fewer on the last, which has the head too, and on the
    first, which has the embedding. Where chunks do not divide the layers, the nearest that would."""
    rounds, more = divmod(layers // chunks, count)
    order = [*range(1, count - 1), 0, count - 1] if count > 2 else list(range(count))
    return tuple(chunks * (rounds + (stage in order[:more])) for stage in range(count))


def _text(numbers: tuple[int, ...]) -> str:
    return ",".join(map(str, numbers))
