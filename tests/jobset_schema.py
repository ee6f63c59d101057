"""The schema of JobSet's own API, as far as we use it, and whether a document follows it.

    python -m tests.jobset_schema jobset.x-k8s.io_jobsets.yaml tests/golden/launch/*.yaml \\
        > tests/golden/launch/schema.json

cuts it from config/components/crd/bases/ of github.com/kubernetes-sigs/jobset (Apache 2.0; this one
is of 0.13.0-devel, August 2026), which holds all of Kubernetes' pods and is 11,000 lines long.
"""

import json
import pathlib
import re
import sys

import yaml

PATH = pathlib.Path(__file__).parent / "golden" / "launch" / "schema.json"
_TYPES = {
    "object": dict,
    "array": list,
    "string": str,
    "integer": int,
    "boolean": bool,
}
_KEPT = (
    *("type", "required", "enum", "pattern", "minimum", "maximum", "maxItems", "maxLength"),
    "x-kubernetes-int-or-string",
)


def cut(schema, documents):
    """What a schema says of values that are there, without descriptions."""
    kept = {name: schema[name] for name in _KEPT if name in schema}
    if isinstance(schema.get("additionalProperties"), dict):  # free names, as of labels
        kept["additionalProperties"] = cut(schema["additionalProperties"], [])
    elif "properties" in schema:
        used = {key for document in documents for key in document}
        kept["properties"] = {
            key: cut(of, [it[key] for it in documents if key in it])
            for key, of in schema["properties"].items()
            if key in used
        }
    elif "items" in schema:
        kept["items"] = cut(schema["items"], [it for document in documents for it in document])
    return kept


def problems(schema, value, where=""):
    """What in a value is not as the schema has it, a line each."""
    if schema.get("x-kubernetes-int-or-string"):
        return [] if type(value) in (int, str) else [f"{where}: {value!r} is no number and no text"]
    kind = schema.get("type")
    if kind and type(value) is not _TYPES[kind]:
        return [f"{where}: {value!r} is no {kind}"]
    found = []
    if value not in schema.get("enum", [value]):
        found.append(f"{where}: {value!r} is none of {schema['enum']}")
    if kind == "string" and not re.search(schema.get("pattern", ""), value):
        found.append(f"{where}: {value!r} does not match {schema['pattern']}")
    if kind == "integer" and not (
        schema.get("minimum", value) <= value <= schema.get("maximum", value)
    ):
        found.append(f"{where}: {value} is out of its bounds")
    if kind in ("array", "string"):
        most = schema.get("maxItems" if kind == "array" else "maxLength", len(value))
        if len(value) > most:
            found.append(f"{where}: longer than {most}")
    if kind == "array":
        for index, item in enumerate(value):
            found += problems(schema.get("items", {}), item, f"{where}[{index}]")
    if kind == "object":
        found += [f"{where}: no {key}" for key in schema.get("required", []) if key not in value]
        for key, item in value.items():
            of = schema.get("properties", {}).get(key, schema.get("additionalProperties"))
            if of is None and schema.keys() & {"properties", "additionalProperties"}:
                found.append(f"{where}: unknown {key}")
            else:
                found += problems(of or {}, item, f"{where}.{key}")
    return found


if __name__ == "__main__":
    crd, *paths = sys.argv[1:]
    (version,) = yaml.safe_load(pathlib.Path(crd).read_text())["spec"]["versions"]
    documents = [yaml.safe_load(pathlib.Path(path).read_text()) for path in paths]
    print(json.dumps(cut(version["schema"]["openAPIV3Schema"], documents), indent=1))
