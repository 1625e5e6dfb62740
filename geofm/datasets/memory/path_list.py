"""A million paths in some megabytes."""

import zlib
from collections import deque
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from geofm.datasets.memory.shared_array import SharedArray

#: Paths that are compressed together. Neighbours have most of their text in common.
BLOCK = 64


class PathList:
    """Paths by number, compressed in blocks.

    The paths of SEN12MS-CR-TS take 60 MB as text and 4 MB here. Looking one up takes some 10
    microseconds, however many there are.
    """

    def __init__(self, texts: Iterable[pa.StringArray]) -> None:
        """Initialize a new PathList instance.

        Args:
            texts: Paths, in parts of any length.
        """
        blocks: list[bytes] = []
        self._length = 0
        # Of a part that is no multiple of a block, the rest goes with the next one.
        rest = pa.array([], pa.string())
        with ThreadPoolExecutor(2) as pool:
            # A part is compressed while the next ones are read.
            waiting: deque[Future[list[bytes]]] = deque()
            for part in texts:
                self._length += len(part)
                rest = pa.concat_arrays([rest, part]) if len(rest) else part
                whole = len(rest) - len(rest) % BLOCK
                waiting.append(pool.submit(_compressed, rest[:whole]))
                rest = rest[whole:]
                if len(waiting) > 4:
                    blocks += waiting.popleft().result()
            for done in waiting:
                blocks += done.result()
        blocks += _compressed(rest)
        ends = np.cumsum([0, *map(len, blocks)])
        self._ends = SharedArray(ends.astype(np.int64))
        self._content = SharedArray(np.frombuffer(b''.join(blocks), np.uint8))

    @classmethod
    def of(cls, paths: Sequence[str]) -> 'PathList':
        """Make a list.

        Args:
            paths: The paths.

        Returns:
            The list.
        """
        return cls([pa.array(paths, pa.string())])

    @classmethod
    def of_parts(
        cls, length: int, ends: npt.NDArray[np.int64], content: npt.NDArray[np.uint8]
    ) -> 'PathList':
        """Make a list of what :attr:`parts` gave.

        Args:
            length: Number of paths.
            ends: Where each block ends.
            content: The blocks.

        Returns:
            The list.
        """
        made = cls.__new__(cls)
        made._length, made._ends, made._content = length, SharedArray(ends), SharedArray(content)
        return made

    @property
    def parts(self) -> tuple[int, npt.NDArray[np.int64], npt.NDArray[np.uint8]]:
        """Number of paths, where each block ends, and the blocks."""
        return self._length, self._ends.array, self._content.array

    def __len__(self) -> int:
        """Number of paths."""
        return self._length

    def __getitem__(self, number: int) -> str:
        """A path.

        Args:
            number: Its number, from 0.

        Returns:
            The path.

        Raises:
            IndexError: If there is no such path.
        """
        if not 0 <= number < self._length:
            raise IndexError(f'path {number} of {self._length}: out of range')
        block, place = divmod(number, BLOCK)
        return self._block(block)[place]

    def take(self, numbers: npt.NDArray[np.integer]) -> list[str]:
        """Several paths.

        Args:
            numbers: Their numbers.

        Returns:
            The paths.
        """
        blocks: dict[int, list[str]] = {}
        found = []
        for number in numbers.tolist():
            block, place = divmod(number, BLOCK)
            if block not in blocks:
                blocks[block] = self._block(block)
            found.append(blocks[block][place])
        return found

    def _block(self, number: int) -> list[str]:
        """Paths of a block."""
        start, end = self._ends.array[number : number + 2].tolist()
        text = zlib.decompress(self._content.array[start:end].tobytes())
        # A path has no such character.
        return text.decode().split('\0')


def _compressed(texts: pa.StringArray) -> list[bytes]:
    """Blocks of paths."""
    if not len(texts):
        return []
    # A path has no such character; Arrow joins many times faster than Python does.
    joined = pc.binary_join_element_wise(texts, '', '\0')
    offsets = np.frombuffer(joined.buffers()[1], np.int32)[joined.offset :][: len(joined) + 1]
    content = memoryview(joined.buffers()[2])
    starts = [*offsets[:-1:BLOCK].tolist(), int(offsets[-1])]
    return [zlib.compress(content[start : end - 1], level=1) for start, end in pairwise(starts)]
