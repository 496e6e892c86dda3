import pytest

from omnilit.errors import ConfigError
from omnilit.registry import Registry


def make():
    registry = Registry("data.kind")
    registry.register("mapping", "omnilit.registry:Registry")
    return registry


def test_a_name_stands_for_what_is_imported_when_it_is_asked_for():
    assert make().load("mapping") is Registry
    assert list(make()) == ["mapping"]


def test_a_path_needs_no_name():
    assert "omnilit.registry:Registry" in make()
    assert make().load("omnilit.registry:Registry") is Registry


def test_registering_the_same_twice_changes_nothing():
    registry = make()
    registry.register("mapping", "omnilit.registry:Registry")
    assert list(registry) == ["mapping"]


def test_another_target_for_a_name_is_refused():
    with pytest.raises(ConfigError, match="'mapping' is registered for omnilit"):
        make().register("mapping", "other:thing")


def test_an_unknown_name_shows_the_closest_and_all():
    with pytest.raises(ConfigError, match=r"Did you mean 'mapping'\?.*use one of mapping, or"):
        make().load("maping")
    with pytest.raises(ConfigError, match=r"'other' is not known\. To fix"):
        make().load("other")
    assert "maping" not in make()


@pytest.mark.parametrize("target", ["no_such_package:x", "omnilit.registry:nothing"])
def test_a_target_that_cannot_be_imported_is_named(target):
    with pytest.raises(ConfigError, match=f"stands for {target}, which cannot be imported"):
        make().load(target)
