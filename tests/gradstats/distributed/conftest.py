import pytest

from tests.ranks import Ranks


@pytest.fixture(scope="session")
def two():
    with Ranks(2) as ranks:
        yield ranks


@pytest.fixture(scope="session")
def four():
    with Ranks(4) as ranks:
        yield ranks
