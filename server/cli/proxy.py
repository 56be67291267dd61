"""``weft proxy …``: named proxies of a running server, a model steered by the logits of others."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import typer

from weft.server.cli import compose
from weft.server.cli.client import Server
from weft.server.cli.remote import (
    IfMatch,
    Json,
    Key,
    StateDir,
    Url,
    busy,
    connected,
    finite,
    matching,
    path_of,
    print_answer,
    print_table,
)
from weft.server.cli.terminal import fail

PATH = "/admin/proxies"
Id = Annotated[str, typer.Argument(metavar="ID", help="The proxy's id, the `model` of requests.", show_default=False)]
Expert = Annotated[
    str,
    typer.Option(
        "--expert",
        metavar="SIDE",
        help="What it is steered towards: a proxy model, MODEL:ADAPTER for an adapter or a composition of one, ADAPTER "
        "for one of the base; or JSON as the API has it.",
        show_default=False,
    ),
]
AntiExpert = Annotated[
    str, typer.Option("--anti-expert", metavar="SIDE", help="What it is steered away from.", show_default=False)
]
Alpha = Annotated[float, typer.Option("--alpha", metavar="NUMBER", help="What the difference of the two counts.")]
Base = Annotated[
    str | None,
    typer.Option(
        "--base", metavar="ID", help="What is steered: an adapter or a composition; default: the base.",
        show_default=False,
    ),
]  # fmt: skip
BaseTopP = Annotated[
    float | None,
    typer.Option(
        "--base-top-p", metavar="NUMBER", help="Keep only the tokens in the base's nucleus of this size.",
        show_default=False,
    ),
]  # fmt: skip


def create_cli() -> typer.Typer:
    """The group of commands, as a typer application."""
    cli = typer.Typer(
        no_args_is_help=True,
        help="Name, list, show, replace and delete proxies of a running server: models steered by the difference of an "
        "expert's and an anti-expert's logits.",
    )
    for command in (list_, create, show, replace, delete):
        cli.command(command.__name__.rstrip("_"))(command)
    return cli


def list_(url: Url = None, admin_key: Key = None, state_dir: StateDir = None, as_json: Json = False) -> None:
    """List the named proxies."""
    with connected(url, admin_key, state_dir) as server:
        answer = server.request("GET", PATH)
    if as_json:
        typer.echo(json.dumps(answer, indent=2))
    else:
        rows = ((proxy["id"], proxy["state"], summary(proxy)) for proxy in answer["data"])
        print_table(("id", "state", "proxy"), rows)


def create(
    id: Id,
    expert: Expert,
    anti_expert: AntiExpert,
    alpha: Alpha = 1.0,
    base: Base = None,
    base_top_p: BaseTopP = None,
    url: Url = None,
    admin_key: Key = None,
    state_dir: StateDir = None,
    as_json: Json = False,
) -> None:
    """Name a proxy and serve it under ID: the logits are those of the base + alpha (expert - anti-expert)."""
    with connected(url, admin_key, state_dir) as server, busy(f"naming {id}"):
        body = _body(server, expert, anti_expert, alpha, base, base_top_p)
        record = server.request("POST", PATH, {"id": id, **body})
    print_answer(record, as_json, f"{id} is served: {summary(record)}")


def show(id: Id, url: Url = None, admin_key: Key = None, state_dir: StateDir = None, as_json: Json = False) -> None:
    """Show a proxy, and why it is not served, where it is not."""
    with connected(url, admin_key, state_dir) as server:
        record = server.request("GET", path_of(PATH, id))
    lines = [f"{id} ({record['state']}): {summary(record)}"]
    lines += [f"{name}: {record[name]}" for name in ("error", "revision") if record[name]]
    print_answer(record, as_json, "\n".join(lines))


def replace(
    id: Id,
    expert: Expert,
    anti_expert: AntiExpert,
    alpha: Alpha = 1.0,
    base: Base = None,
    base_top_p: BaseTopP = None,
    if_match: IfMatch = None,
    url: Url = None,
    admin_key: Key = None,
    state_dir: StateDir = None,
    as_json: Json = False,
) -> None:
    """Have ID mean another proxy in one step; requests under way finish with the one they started with."""
    with connected(url, admin_key, state_dir) as server, busy(f"naming {id}"):
        body = _body(server, expert, anti_expert, alpha, base, base_top_p)
        record = server.request("PUT", path_of(PATH, id), body, headers=matching(if_match))
    print_answer(record, as_json, f"{id} is replaced: {summary(record)}")


def delete(id: Id, url: Url = None, admin_key: Key = None, state_dir: StateDir = None, as_json: Json = False) -> None:
    """Forget a proxy; its models and adapters stay."""
    with connected(url, admin_key, state_dir) as server:
        answer = server.request("DELETE", path_of(PATH, id))
    print_answer(answer, as_json, f"{id} is deleted")


def side(option: str, text: str, models: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The expert or anti-expert that a command line names, as a body has it. Ends the command where it names none.

    Args:
        option: for errors.
        models: what the server serves, as /v1/models lists it. Frozen models are those without a parent: only their
            names end at a colon, so that ids may have colons.
    """
    if text.startswith("{"):
        try:
            return dict(json.loads(text))
        except ValueError as error:
            fail(f"{option}: {text!r} is not JSON: {error}")
    frozen = [model["id"] for model in models if model["parent"] is None]
    if text in frozen:
        return {"model": text}
    model = max((name for name in frozen if text.startswith(f"{name}:")), key=len, default=None)
    adapter = text if model is None else text[len(model) + 1 :]
    if not adapter:
        fail(f"{option}: {text!r} names no adapter behind the colon; {model!r} alone is the model without one")
    if model is not None:
        return {"model": model, "adapter": adapter}
    for one in models:
        if one["id"] == adapter and one.get("proxy_only"):
            fail(f"{option}: {adapter!r} belongs to the proxy model {one['parent']!r}; write {one['parent']}:{adapter}")
    return {"adapter": adapter}


def summary(record: Mapping[str, Any]) -> str:
    """One line on what a proxy is: ``large + 1.5 × (small:tone - small)``."""
    text = f"{record['base']} + {record['alpha']:.4g} × ({_shown(record['expert'])} - {_shown(record['anti_expert'])})"
    return text if record["base_top_p"] is None else f"{text}, base_top_p {record['base_top_p']:.4g}"


def _shown(stream: Mapping[str, Any]) -> str:
    adapter = f"[{compose.summary(stream)}]" if "adapters" in stream else stream.get("adapter")
    chosen = [f"{name}={stream[name]}" for name in ("task_id", "lora_rank", "own_template") if name in stream]
    return " ".join([":".join(filter(None, (stream.get("model"), adapter))), *chosen])


def _body(
    server: Server, expert: str, anti_expert: str, alpha: float, base: str | None, base_top_p: float | None
) -> dict[str, Any]:
    """What a proxy is to be."""
    models = server.request("GET", "/v1/models")["data"]
    body: dict[str, Any] = {
        "expert": side("--expert", expert, models),
        "anti_expert": side("--anti-expert", anti_expert, models),
        "alpha": finite("--alpha", alpha),
    }
    if base is not None:
        body["base"] = base
    if base_top_p is not None:
        body["base_top_p"] = finite("--base-top-p", base_top_p)
    return body
