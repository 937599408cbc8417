"""Fixtures of tests that run whole commands."""

from collections.abc import Iterator

import pytest

from tests.helpers.tool_server import ToolServer


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ToolServer]:
    """Runs the tools, each as a process of its own."""
    with ToolServer(tmp_path_factory.mktemp("runs")) as started:
        yield started
