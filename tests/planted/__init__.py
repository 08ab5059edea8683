"""Tests of the tests: known bugs, put into a copy one by one. Each must turn the suite red."""
