from typing import TypedDict

class BuildInfo(TypedDict):
    cuda_architectures: str
    cuda_runtime: str
    driver: str
    gpus: list[str]
    cpu_simd: str

def build_info() -> BuildInfo: ...
def select_simd(name: str) -> None: ...
def row_bytes(codec: int, shape: tuple[int, int, int]) -> int: ...

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
    shape: tuple[int, int, int],
    strides: tuple[int, int, int, int],
    index: int,
    threads: int,
    target: tuple[int, int],
) -> None: ...
def gather_rows(
    cache: int,
    cache_rows: int,
    cache_stride_bytes: int,
    codec: int,
    out: int,
    dtype: int,
    batch: int,
    shape: tuple[int, int, int],
    index: int,
    index_on_host: bool,
    threads: int,
    target: tuple[int, int],
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
def crc32c(data: bytes | bytearray | memoryview, portable: bool = False) -> int: ...
def read_rows(
    file: tuple[int, int, int, int, int, int],
    slots: int,
    count: int,
    into: int,
    into_stride_bytes: int,
    checksums: int,
    block_bytes: int,
    threads: int,
) -> int: ...
def write_rows(
    file: tuple[int, int, int, int, int, int],
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
    target: tuple[int, int],
) -> None: ...
