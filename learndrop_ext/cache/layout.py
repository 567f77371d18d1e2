"""Where rows lie in memory and in a file."""

from __future__ import annotations

from dataclasses import dataclass

from learndrop_ext.ops.transfer import PAGE_BYTES, RowFile


@dataclass(frozen=True)
class RowLayout:
    """Where rows lie in a file: small ones share a page and none crosses one, large ones each begin one.

    row_bytes: of a row without padding. stride_bytes: from one row to the next in memory.
    """

    row_bytes: int
    stride_bytes: int
    first_byte: int = PAGE_BYTES

    @property
    def rows_per_group(self) -> int:
        """Rows that share a page, 1 for rows of more than half of one."""
        return max(1, PAGE_BYTES // self.stride_bytes)

    @property
    def group_bytes(self) -> int:
        """Bytes from one group of rows to the next, a multiple of a page."""
        return -(-self.rows_per_group * self.stride_bytes // PAGE_BYTES) * PAGE_BYTES

    def begin(self, slot: int) -> int:
        """The file offset of the group that holds a slot."""
        return self.first_byte + slot // self.rows_per_group * self.group_bytes

    def end(self, slots: int) -> int:
        """The file offset behind the last of `slots` rows."""
        return self.first_byte + -(-slots // self.rows_per_group) * self.group_bytes

    def file(self, descriptor: int) -> RowFile:
        """An open file with these rows, as the row transfers want it."""
        return RowFile(
            descriptor, self.first_byte, self.rows_per_group, self.group_bytes, self.stride_bytes, self.row_bytes
        )
