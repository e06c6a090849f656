"""What offloading has done so far, as an object and as a table."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["OffloadStats", "TierStats"]


@dataclass(frozen=True)
class TierStats:
    """What one tier has done.

    Attributes:
        name: ``"host"``, or ``"disk"`` and the directory.
        out_bytes: Bytes copied away from the device.
        back_bytes: Bytes copied back.
        num_out: Copies away.
        num_back: Copies back.
        num_ahead: Those copies back that had begun before backward wanted the tensor.
        num_unmoved: Tensors that backward wanted before their memory was let go of, so that
            nothing had to be copied back.
        num_kept: Tensors that stayed because there was no room for them.
        num_taken: Buffers taken from the pool.
        num_reused: Those that had been used before.
        num_allocations: Allocations of memory for the pool.
        waited_s: How long the compute has waited for copies, as far as it is known.
        inflight_bytes: The most device memory that copies have had in use at once, in the direction
            that had more.
        used_bytes: Bytes of the tier's buffers that are in use now.
        peak_bytes: The most that its buffers have taken: of host memory, or of the disk.
        peak_host_bytes: The most host memory that was taken, also on the way to the disk.
        num_alive: Storages that are away now.
    """

    name: str
    out_bytes: int = 0
    back_bytes: int = 0
    num_out: int = 0
    num_back: int = 0
    num_ahead: int = 0
    num_unmoved: int = 0
    num_kept: int = 0
    num_taken: int = 0
    num_reused: int = 0
    num_allocations: int = 0
    waited_s: float = 0.0
    inflight_bytes: int = 0
    used_bytes: int = 0
    peak_bytes: int = 0
    peak_host_bytes: int = 0
    num_alive: int = 0

    @property
    def reuse_rate(self) -> float:
        """The part of the buffers that had been used before; 0 where none was taken."""
        return self.num_reused / self.num_taken if self.num_taken else 0.0


@dataclass(frozen=True)
class OffloadStats:
    """What all tiers have done; ``print`` shows a table.

    Attributes:
        tiers: One for each tier in use, in the order of first use.
    """

    tiers: tuple[TierStats, ...] = ()

    def __getitem__(self, name: str) -> TierStats:
        """A tier by its name; ``"disk"`` is the first disk.

        Raises:
            KeyError: It has not been used.
        """
        for tier in self.tiers:
            if tier.name == name or tier.name.split(" ")[0] == name:
                return tier
        raise KeyError(name)

    def __str__(self) -> str:
        titles = ["tier", "out", "back", "copies", "ahead", "kept", "reused", "waited"]
        titles += ["buffers", "host"]
        lines = [titles, *(_cells(tier) for tier in self.tiers)]
        widths = [max(len(line[i]) for line in lines) for i in range(len(titles))]
        text = []
        for line in lines:
            cells = [line[0].ljust(widths[0])]
            cells += [cell.rjust(w) for cell, w in zip(line[1:], widths[1:], strict=True)]
            text.append("  ".join(cells).rstrip())
        return "\n".join(text)


def _cells(tier: TierStats) -> list[str]:
    return [
        tier.name,
        _mib(tier.out_bytes),
        _mib(tier.back_bytes),
        f"{tier.num_out}+{tier.num_back}",
        str(tier.num_ahead),
        str(tier.num_kept),
        f"{tier.reuse_rate:.0%}",
        f"{tier.waited_s * 1e3:.1f} ms",
        _mib(tier.peak_bytes),
        _mib(tier.peak_host_bytes),
    ]


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:.1f} MiB"
