"""Names that `import tandem` offers."""

from __future__ import annotations

import pytest

import tandem


def test_errors_are_reachable_from_the_package() -> None:
    assert issubclass(tandem.errors.ConfigError, tandem.errors.TandemError)


def test_an_unknown_recipe_is_refused_with_the_known_ones() -> None:
    with pytest.raises(tandem.errors.ConfigError, match=r"quickstart_sft.*Did you mean 'quickstart_pretrain'"):
        tandem.recipe("quickstart-pretrain")
