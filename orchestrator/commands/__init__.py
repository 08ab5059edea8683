"""The commands: each parses its arguments, calls one function of a floor below, and renders what that returns."""
