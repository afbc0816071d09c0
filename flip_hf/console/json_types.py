"""The type of an object in JSON or YAML: reports, results, log records, configurations, recipes."""

from typing import Any, TypeAlias

# Any: what is under a name depends on the file; who reads a file of others checks the values that it uses.
JsonObject: TypeAlias = dict[str, Any]
