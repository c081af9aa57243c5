"""What the tests of several processes share; support.py tells how to ask for their long forms."""

from functools import partial

import pytest

from tests.scale.support import Sql
from tests.support.postgres import Postgres


@pytest.fixture
def sql(postgres: Postgres, database_url: str) -> Sql:
    """What an operator asks with psql."""
    return partial(postgres.sql, url=database_url)
