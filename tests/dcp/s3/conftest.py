"""The servers that the tests of checkpoints in object stores use."""

from tests.support.object_stores import *  # noqa: F403
