"""The command that checks the installation and the hardware."""

import importlib
import importlib.metadata
import importlib.util
import json
import logging
import os
import platform
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import geofm

Status = Literal['ok', 'warning', 'broken']

#: Required packages, and one that is only used with CUDA.
NEEDED = ('torch', 'torchvision', 'torchgeo', 'lightning', 'kornia', 'timm', 'lightly', 'rasterio')
OPTIONAL = ('xformers',)

#: Shared memory that a few workers may need for batches of large crops, in GiB.
_ENOUGH_SHARED_MEMORY = 1.0

#: Number of open files that the threads of `geofm index` and the workers of a run may need.
_ENOUGH_FILES = 1024

#: Package, folder and file of the CUDA 12 runtime that xformers is built for.
_CUDART = ('nvidia-cuda-runtime-cu12', 'nvidia/cuda_runtime/lib', 'libcudart.so.12')


@dataclass(frozen=True, slots=True)
class Finding:
    """The result of a check.

    Attributes:
        topic: 'version', 'device', 'attention' or 'system'.
        name: What was checked.
        value: The value found.
        status: 'ok', 'warning', or 'broken' if something required does not work.
        advice: How to fix a problem.
    """

    topic: str
    name: str
    value: str
    status: Status = 'ok'
    advice: str = ''


def doctor(json: bool = False) -> None:
    """Print versions, devices, attention implementations, and how to fix problems.

    The exit code is 1 if something required is broken.

    Args:
        json: Print the results as JSON.
    """
    with _quiet():
        findings = examine()
    _print_json(findings) if json else _print_table(findings)
    if any(finding.status == 'broken' for finding in findings):
        sys.exit(1)


def examine() -> list[Finding]:
    """Check the installation and the hardware.

    Returns:
        The results.
    """
    looks: tuple[tuple[str, Callable[[], list[Finding]]], ...] = (
        ('version', _versions),
        ('version', _geography),
        ('device', _devices),
        ('attention', _attention),
        ('system', _system),
    )
    findings = []
    for topic, look in looks:
        try:
            findings += look()
        except Exception as error:
            # A broken installation may raise anything. Report it and go on.
            findings.append(Finding(topic, topic, _line(error), 'broken'))
    return findings


def _versions() -> list[Finding]:
    findings = [
        Finding('version', 'geofm', geofm.__version__),
        Finding('version', 'python', platform.python_version()),
    ]
    for name in (*NEEDED, *OPTIONAL):
        missing: Status = 'broken' if name in NEEDED else 'warning'
        try:
            version = importlib.metadata.version(name)
            if name in NEEDED:
                importlib.import_module(name)
        except importlib.metadata.PackageNotFoundError:
            advice = f'pip install {name}' if name in NEEDED else 'attention on CUDA may be slower'
            findings.append(Finding('version', name, 'not installed', missing, advice))
        except Exception as error:
            advice = f'pip install --force-reinstall {name}=={version}'
            findings.append(Finding('version', name, _line(error), 'broken', advice))
        else:
            findings.append(Finding('version', name, version))
    return findings


def _geography() -> list[Finding]:
    """Check GDAL and PROJ, which break if two installations are mixed."""
    import rasterio
    from rasterio.crs import CRS

    findings = [Finding('version', 'GDAL', rasterio.__gdal_version__)]
    proj = rasterio.__proj_version__
    try:
        # In this context, errors of GDAL are logged and not printed.
        with rasterio.Env():
            CRS.from_epsg(32632)
    except Exception as error:
        advice = f'unset PROJ_LIB, PROJ_DATA and GDAL_DATA, or fix them ({_line(error)})'
        return [*findings, Finding('version', 'PROJ', f'{proj}, no EPSG', 'broken', advice)]
    return [*findings, Finding('version', 'PROJ', proj)]


def _devices() -> list[Finding]:
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()
    text = f'{cores} cores, {torch.get_num_threads()} threads'
    if memory := _memory():
        text += f', {memory:.0f} GiB'
    findings = [Finding('device', 'CPU', text)]
    if torch.backends.mps.is_available():
        findings.append(Finding('device', 'MPS', 'available'))
    if not torch.cuda.is_available():
        built = f'CUDA {torch.version.cuda}' if torch.version.cuda else 'no CUDA'
        return [*findings, Finding('device', 'GPU', f'none (PyTorch built for {built})')]
    return [*findings, *(_gpu(index) for index in range(torch.cuda.device_count()))]


def _gpu(index: int) -> Finding:
    import torch

    name = f'GPU {index}'
    seen = torch.cuda.get_device_properties(index)
    half = 'bf16' if seen.major >= 8 else 'no bf16, so use 16-mixed'
    text = f'{seen.name}, {seen.total_memory / 2**30:.0f} GiB, sm_{seen.major}{seen.minor}, {half}'
    try:
        torch.ones(2, 2, device=f'cuda:{index}').matmul(torch.ones(2, 2, device=f'cuda:{index}'))
        torch.cuda.synchronize(index)
    except RuntimeError as error:
        advice = f'a test computation failed: {_line(error)}'
        return Finding('device', name, text, 'broken', advice)
    return Finding('device', name, text)


def _attention() -> list[Finding]:
    """Find the attention implementation of each device, and check xformers."""
    import torch

    from geofm.models import choose_attention

    cuda = torch.cuda.is_available()
    wanted = [('CPU', torch.device('cpu'), torch.float32)]
    for index in range(torch.cuda.device_count() if cuda else 0):
        half = torch.cuda.get_device_capability(index) >= (8, 0)
        dtype = torch.bfloat16 if half else torch.float16
        device = torch.device('cuda', index)
        wanted += [(f'GPU {index}', device, dtype), (f'GPU {index}', device, torch.float32)]
    findings = []
    for name, device, dtype in wanted:
        method, reason = choose_attention(device, dtype)
        precision = str(dtype).removeprefix('torch.')
        findings.append(Finding('attention', f'{name}, {precision}', f'{method}: {reason}'))
    return [*findings, *_xformers(cuda)]


def _xformers(cuda: bool) -> list[Finding]:
    """Check that the extension of xformers loads. It is only used with CUDA."""
    import torch

    spec = importlib.util.find_spec('xformers')
    if spec is None or spec.origin is None:
        return []
    extension = Path(spec.origin).with_name('_C.so')
    if not extension.is_file():
        return [Finding('attention', 'xformers', 'has no compiled extension', _if(cuda))]
    try:
        torch.ops.load_library(str(extension))
    except OSError as error:
        reason = f'does not load: {str(error.__cause__ or error).splitlines()[0]}'
        return [Finding('attention', 'xformers', reason, _if(cuda), _cudart_advice(reason))]
    return [Finding('attention', 'xformers', 'its extension loads')]


def _if(cuda: bool) -> Status:
    return 'warning' if cuda else 'ok'


def _cudart_advice(reason: str) -> str:
    """Say how the extension finds the CUDA runtime that it was built for."""
    package, folder, library = _CUDART
    if library not in reason:
        return ''
    here = next((Path(p, folder) for p in sys.path if Path(p, folder, library).is_file()), None)
    place = here or f'$(python -c "import site; print(site.getsitepackages()[0])")/{folder}'
    install = '' if here else f'pip install {package} and '
    return f'for CUDA: {install}export LD_LIBRARY_PATH={place}:$LD_LIBRARY_PATH'


def _system() -> list[Finding]:
    return [_cache(), *_shared_memory(), *_open_files()]


def _cache() -> Finding:
    """Check the folder for catalogues of read-only data."""
    from geofm.datasets.catalogue import in_cache

    folder = in_cache(Path.cwd()).parent
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    if existing.is_dir() and os.access(existing, os.W_OK | os.X_OK):
        return Finding('system', 'cache', f'{folder} is writable')
    advice = 'set XDG_CACHE_HOME to a writable folder, for catalogues of read-only data'
    return Finding('system', 'cache', f'{folder} is not writable', 'warning', advice)


def _shared_memory(folder: Path = Path('/dev/shm')) -> list[Finding]:
    """Check the shared memory, through which workers pass batches."""
    if not folder.is_dir():
        return []
    usage = shutil.disk_usage(folder)
    free, total = usage.free / 2**30, usage.total / 2**30
    text = f'{free:.1f} of {total:.1f} GiB free'
    if free >= _ENOUGH_SHARED_MEMORY:
        return [Finding('system', 'shared memory', text)]
    advice = 'workers may crash with a bus error: set num_workers=0, or docker run --shm-size=8g'
    return [Finding('system', 'shared memory', text, 'warning', advice)]


def _open_files() -> list[Finding]:
    try:
        import resource
    except ModuleNotFoundError:
        # Windows has no limit.
        return []
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    unlimited = soft == resource.RLIM_INFINITY
    text = 'unlimited' if unlimited else f'{soft} (at most {hard})'
    if unlimited or soft >= _ENOUGH_FILES:
        return [Finding('system', 'open files', text)]
    return [Finding('system', 'open files', text, 'warning', f'ulimit -n {_ENOUGH_FILES}')]


def _memory() -> float | None:
    try:
        return os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30
    except (AttributeError, ValueError, OSError):
        return None


def _line(error: BaseException) -> str:
    """Describe an error in one line."""
    text = str(error).strip().splitlines()
    return f'{type(error).__name__}: {text[0]}' if text else type(error).__name__


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the logs and warnings of libraries."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            yield
    finally:
        logging.disable(before)


def _print_json(findings: list[Finding]) -> None:
    print(json.dumps([asdict(finding) for finding in findings], indent=2))


def _print_table(findings: list[Finding]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    colours: dict[Any, str] = {'ok': 'green', 'warning': 'yellow', 'broken': 'bold red'}
    table = Table(*[''] * 4, show_header=False)
    topic = findings[0].topic
    for finding in findings:
        if finding.topic != topic:
            table.add_section()
            topic = finding.topic
        status = f'[{colours[finding.status]}]{finding.status}[/]'
        table.add_row(status, finding.topic, finding.name, escape(finding.value))
    console = Console()
    console.print(table)
    # Below the table and not wrapped, so that commands can be copied.
    for finding in findings:
        if finding.advice:
            console.print(escape(f'{finding.name}: {finding.advice}'), soft_wrap=True)
