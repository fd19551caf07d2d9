"""The published test suites of the packages that this one stands in for, run against it: make test-peers.

They are downloaded as source distributions into .peers/, which git ignores, and nothing of them is kept here.
"""
