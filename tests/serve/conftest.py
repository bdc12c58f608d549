"""Servers with a fake engine that tests share; before each test the engine is as new."""

import pytest


@pytest.fixture(scope="session")
def chat_server():
    from tests.serve.fake_server import FakeEngine, serving

    engine = FakeEngine()
    with serving(engine) as port:
        yield port, engine


@pytest.fixture(scope="session")
def byte_server():
    from tests.serve.fake_server import BASE, FakeEngine, serving

    engine = FakeEngine(BASE)
    with serving(engine) as port:
        yield port, engine


@pytest.fixture
def engine(chat_server):
    """The fake engine of a chat model."""
    _, engine = chat_server
    engine.reset()
    return engine


@pytest.fixture
def port(chat_server, engine):
    """The port of the server of `engine`."""
    return chat_server[0]


@pytest.fixture
def byte_engine(byte_server):
    """The fake engine of a model whose tokens are bytes, and which cannot chat."""
    _, engine = byte_server
    engine.reset()
    return engine


@pytest.fixture
def byte_port(byte_server, byte_engine):
    """The port of the server of `byte_engine`."""
    return byte_server[0]
