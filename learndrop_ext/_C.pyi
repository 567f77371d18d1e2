from typing import TypedDict

class BuildInfo(TypedDict):
    cuda_architectures: str
    cuda_runtime: str
    driver: str
    gpus: list[str]
    cpu_simd: str

def build_info() -> BuildInfo: ...
def select_simd(name: str) -> None: ...

class RowShape:
    def __init__(self, height: int, width: int, channels: int) -> None: ...
    @property
    def height(self) -> int: ...
    @property
    def width(self) -> int: ...
    @property
    def channels(self) -> int: ...

def row_bytes(codec: int, shape: RowShape) -> int: ...

HELD_ROWS: int

def first_outside(index: int, batch: int, rows: int) -> int: ...
def first_repeated(index: int, batch: int) -> int: ...
def append_rows(
    cache: int,
    cache_rows: int,
    cache_stride_bytes: int,
    codec: int,
    rows: int,
    dtype: int,
    batch: int,
    shape: RowShape,
    stride_b: int,
    stride_h: int,
    stride_w: int,
    stride_c: int,
    index: int,
    threads: int,
    device: int,
    stream: int,
) -> None: ...
def gather_rows(
    cache: int,
    cache_rows: int,
    cache_stride_bytes: int,
    codec: int,
    out: int,
    dtype: int,
    batch: int,
    shape: RowShape,
    index: int,
    index_on_host: bool,
    threads: int,
    device: int,
    stream: int,
) -> None: ...
def delta_norms(
    chunks: int,
    chunk_count: int,
    starts: int,
    layers: int,
    anchors: int,
    row_bytes: int,
    role: int,
    partials: int,
    out: int,
    persistence: bool,
    refresh: bool,
    threads: int,
) -> None: ...
def digests(chunks: int, chunk_count: int, seeds: int, out: int, tensors: int, threads: int) -> None: ...

class RowFile:
    def __init__(
        self,
        descriptor: int,
        rows_offset: int,
        rows_per_group: int,
        group_bytes: int,
        place_bytes: int,
        row_bytes: int,
    ) -> None: ...

def crc32c(data: bytes | bytearray | memoryview, portable: bool = False) -> int: ...
def read_rows(
    file: RowFile,
    slots: int,
    count: int,
    into: int,
    into_stride_bytes: int,
    checksums: int,
    block_bytes: int,
    threads: int,
) -> int: ...
def write_rows(
    file: RowFile,
    slots: int,
    count: int,
    rows: int,
    rows_stride_bytes: int,
    checksums: int,
    threads: int,
) -> None: ...
def pin(address: int, bytes: int, device: int) -> None: ...
def unpin(address: int) -> None: ...
def host_rows_to_device(
    source: int,
    source_stride_bytes: int,
    index: int,
    count: int,
    into: int,
    into_stride_bytes: int,
    row_bytes: int,
    kernel: bool,
    index_on_host: bool,
    device: int,
    stream: int,
) -> None: ...
