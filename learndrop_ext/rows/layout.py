"""The positions of rows in memory and in a file."""

from __future__ import annotations

from dataclasses import dataclass

from learndrop_ext.ops.transfer import PAGE_BYTES, RowFile


@dataclass(frozen=True)
class RowLayout:
    """The offsets of rows in a file. Small rows share a page and never cross its end; each large row begins a page.

    Args:
        row_bytes (int): bytes of a row without padding.
        stride_bytes (int): bytes from one row to the next, in memory and within a page.
        first_byte (int, optional): file offset of the first row, after the header. Default: one page
    """

    row_bytes: int
    stride_bytes: int
    first_byte: int = PAGE_BYTES

    @property
    def rows_per_group(self) -> int:
        """Rows that share a page; 1 for rows of more than half a page."""
        return max(1, PAGE_BYTES // self.stride_bytes)

    @property
    def group_bytes(self) -> int:
        """Bytes from one group of rows to the next, a multiple of the page size."""
        return -(-self.rows_per_group * self.stride_bytes // PAGE_BYTES) * PAGE_BYTES

    def begin(self, slot: int) -> int:
        """Return the file offset of the group that holds a slot."""
        return self.first_byte + slot // self.rows_per_group * self.group_bytes

    def end(self, slots: int) -> int:
        """Return the file offset after the last of `slots` rows."""
        return self.first_byte + -(-slots // self.rows_per_group) * self.group_bytes

    def file(self, descriptor: int) -> RowFile:
        """Return an open file with this layout for `transfer.read_rows` and `transfer.write_rows`."""
        return RowFile(
            descriptor, self.first_byte, self.rows_per_group, self.group_bytes, self.stride_bytes, self.row_bytes
        )
