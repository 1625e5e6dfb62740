"""Pages and a browser that are shared by the tests of the page."""

import functools
import shutil
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    # They need the extra "maps".
    from tests.maps.pages import Browser, Made


@pytest.fixture(scope='session')
def pages(tmp_path_factory: pytest.TempPathFactory) -> 'Callable[[str], Made]':
    """Pages by the name of their grid, made on demand."""
    from tests.maps.pages import GRIDS, make

    @functools.cache
    def made(name: str) -> 'Made':
        return make(tmp_path_factory.mktemp(name), *GRIDS[name])

    return made


@pytest.fixture(scope='session')
def browser(tmp_path_factory: pytest.TempPathFactory) -> 'Iterator[Browser]':
    """The browser."""
    pytest.importorskip('selenium')
    for program, package in (('chromium', 'chromium'), ('chromedriver', 'chromium-driver')):
        if shutil.which(program) is None:
            pytest.skip(f'needs {program}: on Debian, apt-get install {package}')
    from tests.maps.pages import Browser

    browser = Browser(tmp_path_factory.mktemp('profile'))
    yield browser
    browser.driver.quit()


@pytest.fixture
def opened(
    browser: 'Browser', pages: 'Callable[[str], Made]', request: pytest.FixtureRequest
) -> 'Iterator[tuple[Browser, Made]]':
    """A page in the browser, whose console must be empty after the test."""
    made = pages(getattr(request, 'param', 'utm'))
    browser.messages()
    browser.open(made.index.as_uri())
    yield browser, made
    assert browser.messages() == []
