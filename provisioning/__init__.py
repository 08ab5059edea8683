"""Where nodes and objects come from."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from provisioning.base import Home, Provider

_MODULES = {"local": "local", "ssh": "ssh", "lambda": "lambda_cloud", "ec2": "ec2"}
_CONSOLES = {
    "lambda": "https://cloud.lambda.ai/instances",
    "ec2": "https://console.aws.amazon.com/ec2/home#Instances:",
}


def provider_names() -> list[str]:
    """The providers that a spec may name."""
    return list(_MODULES)


def console_of(name: str) -> str:
    """The page on which a person can end a provider's nodes, in words."""
    return _CONSOLES.get(name, f"the console of {name}")


def open_provider(name: str, home: Home, hardware: dict[str, object]) -> Provider:
    """The provider `name`, configured by a spec's hardware section (an empty one serves for listing and ending nodes).
    Its module is imported only now. Raises InvalidHardware for a name that is none, CredentialsError."""
    from provisioning.base import InvalidHardware

    if name not in _MODULES:
        raise InvalidHardware(f"no provider is called {name!r}", hint=f"one of {', '.join(_MODULES)}")
    provider: Provider = importlib.import_module(f"provisioning.{_MODULES[name]}").open(home, hardware)
    return provider
