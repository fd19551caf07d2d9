"""The servers that all tests of object stores use."""

from tests.support.object_stores import *  # noqa: F403
