"""Filters that escape: the program itself reads back every printable character, and what it cannot be told is refused."""

from __future__ import annotations

import base64
import ctypes
import fnmatch
import functools
import getpass
import itertools
import json
import random
import re
import socket
import string
import subprocess
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.error import HTTPError

import jinja2
import pytest
import redis
import yaml
from ansible.errors import AnsibleFilterError
from ansible.parsing.dataloader import DataLoader
from ansible.plugins.loader import filter_loader, init_plugin_loader
from ansible.template import Templar, trust_as_template
from jinja2 import nodes

from filter import escape
from helpers import REPOSITORY
from helpers.preflight import of_roles, site
from helpers.sites import free_port
from helpers.waiting import wait_for
from module_utils import redis_client

#: What Ansible or the inventory says of a lonely host.
HOST: dict[str, Any] = {
    "ansible_managed": "Ansible managed",
    "inventory_hostname": "one",
    "inventory_hostname_short": "one",
    "inventory_dir": "/inventory",
    "group_names": [],
    "groups": {},
    "hostvars": {"one": {}, "two": {}},
    "ansible_facts": {
        "distribution_major_version": "12",
        "memtotal_mb": 100,
        "virtualization_role": "",
        "virtualization_type": "",
    },
}

init_plugin_loader()
filter_loader.add_directory(str(REPOSITORY / "plugins/filter"))


def render(template: str, **variables: Any) -> str:
    """Return a role's template (`<role>/<file>.j2`), rendered with the variables of all roles and with these."""
    values = {name: value for part in ("defaults", "vars") for name, value in of_roles(part).items()}
    role, _, file = template.partition("/")
    text = (REPOSITORY / "roles" / role / "templates" / file).read_text()
    templar = Templar(loader=DataLoader(), variables=values | HOST | variables)  # type: ignore[no-untyped-call]
    return str(templar.template(trust_as_template(text), preserve_trailing_newlines=True))


ASCII = "".join(map(chr, range(0x20, 0x7F)))
#: Beyond ASCII: of Latin-1, of two and of four bytes, and a blank that is none in any of these syntaxes.
UNICODE = "ß€😀\u00a0"
SPECIAL = "\"'\\#$%{}`; =:\u00a0ß"
_dice = random.Random(15)
#: All at once, each alone and at the ends and in the middle of a word, and what may mean something together.
VALUES = [
    ASCII,
    ASCII[::-1],
    f"a{ASCII}z",
    UNICODE,
    *(form.format(c) for c in string.punctuation + " " + UNICODE for form in ("{}", "a{}", "{}a", "a{}b", "a {} b", "{0}{0}")),
    *("".join(_dice.choices(SPECIAL + "ab", k=_dice.randint(2, 12))) for _ in range(150)),
    *("null", "true", "no", "12", "1e5", "0x1f", "~", "a\\nb", "\\x41", "$(k.v0)", "${HOME}", "$HOME", "%n", "%%", "$$", "{{ x }}", "~/x"),
]
#: Each filter, and what it refuses of the values above.
REFUSED: dict[Callable[[Any], str], Callable[[str], bool]] = {
    escape.redis_quote: lambda _: False,
    escape.redis_acl_word: lambda text: bool(re.search(r"[\s*?\[\]\\^()]", text)),
    escape.rabbitmq_conf_value: lambda text: bool(re.search(r"#|\$\(|[€😀]|^[\s']|\s$", text)),
    escape.erlang_string: lambda _: False,
    escape.systemd_value: lambda text: text[0] in " \u00a0" or text[-1] in " \u00a0\\",
    escape.systemd_exec_arg: lambda _: False,
    escape.environment_file: lambda _: False,
    escape.nginx_quote: lambda text: "$" in text,
    escape.yaml_quote: lambda _: False,
    escape.ssh_config_quote: lambda text: "${" in text,
}


def carried(filter_: Callable[[Any], str]) -> list[str]:
    """Return the values that a syntax carries."""
    return [text for text in VALUES if not REFUSED[filter_](text)]


@contextmanager
def running(*command: str | Path, **options: Any) -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **options) as process:
        try:
            yield process
        finally:
            process.kill()
            process.wait(10)


def test_every_filter_is_tested() -> None:
    assert {filter_.__name__ for filter_ in REFUSED} == set(escape.FilterModule().filters())


@pytest.mark.parametrize("filter_", REFUSED, ids=lambda filter_: filter_.__name__)
def test_what_a_syntax_cannot_carry_is_refused_and_nothing_else(filter_: Callable[[Any], str]) -> None:
    for text in VALUES:
        if REFUSED[filter_](text):
            with pytest.raises(AnsibleFilterError) as error:
                filter_(text)
            assert len(text) < 3 or text not in str(error.value)
        else:
            filter_(text)
    for control in "\0" + ("" if filter_ is escape.environment_file else "\n\r\t\x0b\x1b\x7f\x85\u2028"):
        with pytest.raises(AnsibleFilterError):
            filter_(f"a{control}b")


# --- Redis and Sentinel ---


@contextmanager
def redis_server(folder: Path, *arguments: str, port: int) -> Iterator[None]:
    with running("redis-server", *arguments, cwd=folder) as process:
        wait_for("Redis", lambda: process.poll() is not None or listens(port))
        assert process.poll() is None, (process.stdout and process.stdout.read()) or b""
        yield


def listens(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


def test_redis_reads_back_what_is_quoted(tmp_path: Path) -> None:
    port, texts = free_port(), carried(escape.redis_quote)
    users = [f"user u{number} on {escape.redis_quote('>' + text)} +ping" for number, text in enumerate(texts)]
    (tmp_path / "redis.conf").write_text("\n".join([f"port {port}", f"masterauth {escape.redis_quote(ASCII + UNICODE)}", *users]))

    with redis_server(tmp_path, "redis.conf", port=port):
        for number, text in enumerate(texts):
            assert redis.Redis(port=port, username=f"u{number}", password=text).ping()
        assert redis.Redis(port=port, decode_responses=True).config_get("masterauth")["masterauth"] == ASCII + UNICODE


def test_our_modules_read_a_line_as_redis_does() -> None:
    for text in carried(escape.redis_quote):
        assert redis_client.words_of(f"masterauth {escape.redis_quote(text)} x") == ["masterauth", text, "x"]
    assert redis_client.words_of(r"""a 'b "c\' \n' "\x41\n\q\\" d\e#f """) == ["a", "b \"c' \\n", "A\nq\\", "d\\e#f"]
    for line in ('a "b', "a 'b", 'a "b"c', 'a b"', "a 'b\\'"):
        with pytest.raises(ValueError, match="unbalanced"):
            redis_client.words_of(line)


def test_redis_takes_names_and_prefixes_to_the_letter(tmp_path: Path) -> None:
    port, texts = free_port(), carried(escape.redis_acl_word)
    lines = [f"user {escape.redis_acl_word(text)} on >x ~{escape.redis_acl_word(text)}:* +set" for text in texts]
    (tmp_path / "users.acl").write_text("\n".join(dict.fromkeys(lines)))
    (tmp_path / "redis.conf").write_text(f"port {port}\naclfile users.acl\nsave ''\n")

    with redis_server(tmp_path, "redis.conf", port=port):
        for text in texts:
            client = redis.Redis(port=port, username=text, password="x")
            assert client.set(f"{text}:key", 1)
            with pytest.raises(redis.exceptions.NoPermissionError):
                client.set("other:key", 1)


#: Whatever Sentinel itself can write down.
SENTINEL_PASSWORD = (ASCII + UNICODE[:-1]).translate(dict.fromkeys(map(ord, " '\"")))


def test_a_site_whose_passwords_hold_everything(tmp_path: Path) -> None:
    """A master, its replica and a Sentinel by the roles' templates: they reach each other, also after a restart of Sentinel."""
    passwords = {"replication": ASCII + UNICODE, "sentinel": SENTINEL_PASSWORD, "orders": UNICODE + ASCII[::-1]}
    users = [{"name": name, "password": text} | ({"purpose": name} if name != "orders" else {}) for name, text in passwords.items()]
    default, watching = f"default {ASCII}", free_port()
    ports = [free_port(), free_port()]
    site = {
        "groups": {"redis": ["one", "two"], "redis_sentinel": ["one"], "pki": []},
        "redis_address": "127.0.0.1",
        "redis_bind": ["127.0.0.1"],
        "redis_tls": False,
        "redis_requirepass": default,
        "redis_users": users,
        "redis_min_replicas_to_write": 1,
        "redis_settings": {"repl-ping-replica-period": 1, "lazyfree-lazy-expire": True, "client-output-buffer-limit": "replica 1mb 1mb 60"},
        "redis_sentinel_port": watching,
        "__redis_acl": "users.acl",
        "__redis_sentinel_acl": "sentinel-users.acl",
        "pki_ca_file": "",
        "pki_certificate_file": "",
        "pki_key_file": "",
    }

    def write(folder: Path, *templates: str, **more: Any) -> list[str]:
        folder.mkdir()
        for template in templates:
            text = render(template, **site | more).replace("dir /var/lib/redis\n", f"dir {folder}\n")
            (folder / Path(template).stem).write_text(text)
        return [word for template in templates if "acl" not in template for word in ("--include", Path(template).stem)]

    def start(number: int) -> Any:
        folder = tmp_path / str(number)
        files = ("celery-platform.conf", "celery-platform-secrets.conf", "users.acl")
        includes = write(folder, *(f"redis/{file}.j2" for file in files), redis_port=ports[number])
        (folder / "state.conf").write_text(f"dir {folder}\n" + (f"replicaof 127.0.0.1 {ports[0]}\n" if number else ""))
        return redis_server(folder, "state.conf", *includes, port=ports[number])

    def client(port: int, user: str = "default", password: str = default) -> redis.Redis:
        return redis.Redis(port=port, username=user, password=password, decode_responses=True)

    with start(0), start(1):
        wait_for("a replica with its master's data", lambda: client(ports[1]).info("replication")["master_link_status"] == "up")
        assert client(ports[0]).config_get("lazyfree-lazy-expire") == {"lazyfree-lazy-expire": "yes"}
        assert client(ports[0], "orders", passwords["orders"]).ping()

        folder = tmp_path / "sentinel"
        includes = write(folder, *(f"redis_sentinel/{file}.j2" for file in ("celery-platform-sentinel.conf", "sentinel-users.acl")))
        (folder / "state.conf").write_text(f"sentinel monitor celery 127.0.0.1 {ports[0]} 1\n")
        # The second time, with what Sentinel has written itself.
        for _ in range(2):
            with redis_server(folder, "state.conf", "--sentinel", *includes, port=watching):
                # Its replicas are what the master tells who may ask it.
                wait_for("an answer of the master", lambda: client(watching).sentinel_master("celery")["num-slaves"] == 1)
                wait_for("an answer of the replica", lambda: client(watching).sentinel_slaves("celery")[0]["flags"] == "slave")
                wait_for("what it says", lambda: client(watching).sentinel_slaves("celery")[0]["master-link-status"] == "ok")
            assert f"sentinel auth-pass celery {SENTINEL_PASSWORD}\n" in (folder / "state.conf").read_text()


# --- RabbitMQ ---


def erlang(code: str, folder: Path, *options: str | Path) -> list[str]:
    """Return the strings that a piece of Erlang prints, in Base64."""
    line = f'[io:format("~s~n", [base64:encode(unicode:characters_to_binary(V))]) || V <- begin {code} end], halt().'
    done = subprocess.run(["erl", "-noshell", *options, "-eval", line], cwd=folder, capture_output=True, text=True, check=True)
    return [base64.b64decode(line).decode() for line in done.stdout.splitlines()]


def test_rabbitmq_reads_back_its_settings(tmp_path: Path) -> None:
    (library,) = Path("/usr/lib/rabbitmq/lib").glob("rabbitmq_server-*/plugins/cuttlefish-*/ebin")
    (tmp_path / "test.schema").write_text("""
        {mapping, "k.$name", "app.k", [{datatype, string}]}.
        {translation, "app.k", fun(Conf) -> cuttlefish_variable:filter_by_prefix("k", Conf) end}.
    """)
    texts = carried(escape.rabbitmq_conf_value)
    (tmp_path / "test.conf").write_text("".join(f"k.v{number} = {escape.rabbitmq_conf_value(text)}\n" for number, text in enumerate(texts)))

    read = erlang(
        """[{app, [{k, Found}]}] = cuttlefish_generator:map(cuttlefish_schema:files(["test.schema"]), cuttlefish_conf:file("test.conf")),
        [lists:last(Name) ++ "=" ++ Value || {Name, Value} <- Found]""",
        tmp_path,
        "-pa",
        library,
    )

    assert {line.partition("=")[0]: line.partition("=")[2] for line in read} == {f"v{number}": text for number, text in enumerate(texts)}
    assert [escape.rabbitmq_conf_value(value) for value in (True, False, 5, "yes")] == ["true", "false", "5", "yes"]


def test_erlang_reads_back_strings(tmp_path: Path) -> None:
    texts = carried(escape.erlang_string)
    (tmp_path / "terms").write_text(f"[{', '.join(map(escape.erlang_string, texts))}].\n")

    assert erlang('{ok, [Found]} = file:consult("terms"), Found', tmp_path) == texts


def test_rabbitmq_learns_names_that_look_like_something_else(tmp_path: Path) -> None:
    text = render(
        "rabbitmq/definitions.yml.j2",
        rabbitmq_applications=[{"name": "1e5", "queues": ["null", "12", "a.b"]}],
        rabbitmq_users=[{"name": "no", "purpose": "worker"}, {"name": "0x1f", "purpose": "producer"}],
    )
    found = yaml.safe_load(text)

    assert [vhost["name"] for vhost in found["vhosts"]] == ["1e5"]
    assert [user["name"] for user in found["users"]] == ["no", "0x1f"]
    assert [queue["name"] for queue in found["queues"]][:3] == ["null", "12", "a.b"]
    assert {item["vhost"] for kind in ("permissions", "exchanges", "queues", "bindings", "policies") for item in found[kind]} == {"1e5"}


# --- systemd: units and arguments are read back on a host (molecule/default/tests/test_services.py) ---


@pytest.fixture(scope="module")
def systemd() -> ctypes.CDLL:
    """The functions of systemd itself that read an EnvironmentFile= and judge what is in it."""
    found = sorted(Path("/usr/lib").glob("**/systemd/libsystemd-shared-*.so"))
    if not found:
        pytest.skip("this machine has no systemd")
    library = ctypes.CDLL(str(found[0]))
    library.load_env_file.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.POINTER(ctypes.POINTER(ctypes.c_char_p))]
    library.env_value_is_valid.restype = ctypes.c_bool
    return library


def environment_of(systemd: ctypes.CDLL, file: Path) -> dict[str, str]:
    """Return the variables that a service gets of a file; none if systemd does not read it."""
    read = ctypes.POINTER(ctypes.c_char_p)()
    if systemd.load_env_file(None, bytes(file), ctypes.byref(read)) != 0:
        return {}
    lines = itertools.takewhile(lambda line: line is not None, (read[number] for number in itertools.count()))
    assignments = [line.partition(b"=") for line in lines if line]
    return {name.decode(): value.decode() for name, _, value in assignments if systemd.env_value_is_valid(value)}


def test_systemd_reads_back_every_variable(systemd: ctypes.CDLL, tmp_path: Path) -> None:
    texts = [text for text in VALUES if not re.search("{[{%#]", text)]  # which Ansible has a meaning for
    texts += ["", " ", "".join(map(chr, range(1, 0x20))), "\t", "\r", "a\r\nb", "a\\\nb", "\tx\n\n", "a\n# x", "A=1", "None", "false"]
    variables = {f"V{number}": text for number, text in enumerate(texts)}
    secrets = {f"S{number}": text for number, text in enumerate(texts)}
    here = site(tmp_path, celery_app_environment=variables, celery_app_secret_environment=secrets)
    for name in ("celery.env", "secret.env"):
        (tmp_path / name).write_text(here.render(f"celery_app/templates/{name}.j2"), newline="")
    found = environment_of(systemd, tmp_path / "celery.env")

    assert {name: found.get(name) for name in variables} == variables
    assert environment_of(systemd, tmp_path / "secret.env") == secrets
    assert not secrets.keys() & found.keys()


def test_what_systemd_does_not_take_is_refused_and_nothing_else(systemd: ctypes.CDLL, tmp_path: Path) -> None:
    taken, refused = "", []
    for character in map(chr, [*range(1, 0x10000), *(plane << 16 | low for plane in range(1, 17) for low in (0, 0xFFFD, 0xFFFE, 0xFFFF))]):
        try:
            escape.environment_file(character)
            taken += character
        except AnsibleFilterError:
            refused.append(character)
    (tmp_path / "env").write_text(f"A={escape.environment_file(taken)}\n", newline="")
    assert environment_of(systemd, tmp_path / "env") == {"A": taken}
    for character in refused:
        (tmp_path / "env").write_text(f'A="{character}"\n', errors="surrogatepass")
        assert environment_of(systemd, tmp_path / "env") == {}, repr(character)
    by_preflight = re.findall(site(tmp_path).value("__celery_app_refused_characters"), "".join(map(chr, range(1, 0x10000))))
    assert by_preflight == [character for character in refused if ord(character) < 0x10000]


# --- nginx ---


@contextmanager
def nginx(folder: Path, http: str) -> Iterator[None]:
    lines = [
        f"pid {folder}/pid; error_log stderr; daemon off; user {getpass.getuser()}; events {{}}",
        f"http {{ access_log off; {' '.join(f'{kind}_temp_path {folder}/{kind};' for kind in TEMPORARY)} {http} }}",
    ]
    (folder / "nginx.conf").write_text("\n".join(lines))
    with running("nginx", "-e", "stderr", "-c", folder / "nginx.conf") as process:
        port = int(re.findall(r"listen \S*:(\d+)", http)[0])
        wait_for("nginx", lambda: process.poll() is not None or listens(port))
        assert process.poll() is None, process.stdout and process.stdout.read()
        yield


TEMPORARY = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")


def test_nginx_reads_back_what_is_quoted(tmp_path: Path) -> None:
    port, texts = free_port(), carried(escape.nginx_quote)
    locations = "\n".join(f"location = /{number} {{ return 200 {escape.nginx_quote(text)}; }}" for number, text in enumerate(texts))

    with nginx(tmp_path, f"server {{ listen 127.0.0.1:{port}; {locations} }}"):
        for number, text in enumerate(texts):
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/{number}") as answer:
                assert answer.read().decode() == text


def test_nginx_lets_people_in_with_any_password(tmp_path: Path) -> None:
    port, people = free_port(), {"a.person_1@example-x": ASCII + UNICODE, "other": UNICODE + ASCII[::-1]}
    users = [{"name": name, "password": password} for name, password in people.items()]
    (tmp_path / "htpasswd").write_text(render("monitoring_proxy/htpasswd.j2", monitoring_proxy_users=users))

    def status(name: str, password: str) -> int:
        login = base64.b64encode(f"{name}:{password}".encode()).decode()
        request = urllib.request.Request(f"http://127.0.0.1:{port}/", headers={"Authorization": f"Basic {login}"})
        try:
            with urllib.request.urlopen(request) as answer:
                return int(answer.status)
        except HTTPError as error:
            return error.code

    (tmp_path / "index.html").write_text("in")
    with nginx(tmp_path, f"server {{ listen 127.0.0.1:{port}; root {tmp_path}; auth_basic x; auth_basic_user_file {tmp_path}/htpasswd; }}"):
        for name, password in people.items():
            assert [status(name, text) for text in (password, password[:-1], password + "x")] == [200, 401, 401]


# --- Prometheus and others that read YAML ---


def test_prometheus_reads_back_texts(tmp_path: Path) -> None:
    port, texts = free_port(), carried(escape.yaml_quote)
    targets = [f'{{targets: ["127.0.0.1:9"], labels: {{number: "{n}", text: {escape.yaml_quote(text)}}}}}' for n, text in enumerate(texts)]
    (tmp_path / "prometheus.yml").write_text(
        f"global: {{scrape_interval: 1h}}\nscrape_configs: [{{job_name: x, static_configs: [{', '.join(targets)}]}}]\n"
    )

    with running("prometheus", "--config.file=prometheus.yml", f"--web.listen-address=127.0.0.1:{port}", cwd=tmp_path):
        url = f"http://127.0.0.1:{port}/api/v1/targets"

        def targets_found() -> list[dict[str, str]]:
            with urllib.request.urlopen(url) as answer:
                return [target["discoveredLabels"] for target in json.load(answer)["data"]["activeTargets"]]

        wait_for("all targets", lambda: listens(port) and len(targets_found()) == len(texts), seconds=120, every=1)
        assert {int(labels["number"]): labels["text"] for labels in targets_found()} == dict(enumerate(texts))


def test_python_reads_back_texts() -> None:
    for text in carried(escape.yaml_quote):
        assert yaml.safe_load(f"[{{a: {escape.yaml_quote(text)}}}]") == [{"a": text}]


def test_alertmanager_takes_any_url(tmp_path: Path) -> None:
    url = "https://example.org/" + ASCII.replace(" ", "").replace("%", "%25") + "ß"
    text = render_with_other_delimiters("alertmanager/alertmanager.yml.j2", alertmanager_watchdog_url=url, alertmanager_webhook="")
    (tmp_path / "alertmanager.yml").write_text(text)

    subprocess.run(["amtool", "check-config", "alertmanager.yml"], cwd=tmp_path, check=True, capture_output=True)
    (hook,) = yaml.safe_load(text)["receivers"][1]["webhook_configs"]
    assert hook["url"] == url


def test_alertmanager_takes_receivers_of_every_kind_as_they_are(tmp_path: Path) -> None:
    receivers = {
        "email_configs": [{"to": "oncall@example.org", "headers": {"subject": '{{ .GroupLabels.alertname }} "x"'}}],
        "pagerduty_configs": [{"routing_key": ASCII, "send_resolved": True}],
        "webhook_configs": [{"url": "https://example.org/hook"}],
    }
    shared = {"smtp_smarthost": "mail.example.org:587", "smtp_from": "a@example.org", "smtp_auth_password": ASCII + UNICODE}
    text = render_with_other_delimiters(
        "alertmanager/alertmanager.yml.j2",
        alertmanager_watchdog_url="",
        alertmanager_webhook="https://example.org/slack",
        alertmanager_receivers=receivers,
        alertmanager_global=shared,
    )
    (tmp_path / "alertmanager.yml").write_text(text)

    subprocess.run(["amtool", "check-config", "alertmanager.yml"], cwd=tmp_path, check=True, capture_output=True)
    found = yaml.safe_load(text)
    assert found["receivers"][0].keys() == {"name", "slack_configs", *receivers}
    assert {kind: found["receivers"][0][kind] for kind in receivers} == receivers
    assert {name: found["global"][name] for name in shared} == shared


def render_with_other_delimiters(template: str, **variables: Any) -> str:
    role, _, file = template.partition("/")
    environment = jinja2.Environment(trim_blocks=True, **OTHER_DELIMITERS)
    environment.filters |= escape.FilterModule().filters() | {"to_json": json.dumps}
    values = {"ansible_managed": "x", "alertmanager_repeat_page": 2, "alertmanager_repeat_ticket": 24}
    values |= {"alertmanager_global": {}, "alertmanager_receivers": {}, "site_pace": 1, "__alertmanager_broker_alert": "RedisWithoutMaster"}
    return environment.from_string((REPOSITORY / "roles" / role / "templates" / file).read_text()).render(values | variables)


OTHER_DELIMITERS = {
    "variable_start_string": "<<",
    "variable_end_string": ">>",
    "block_start_string": "<%",
    "block_end_string": "%>",
    "comment_start_string": "<#",
    "comment_end_string": "#>",
}


# --- Python, ssh, logrotate ---


def test_flower_reads_back_its_options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {f"option_{number}": text for number, text in enumerate(VALUES)} | {"nested": {"a": [VALUES[0], None, True, 1.5]}}
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path))
    (tmp_path / "flower_users").write_text(f"person:{ASCII}{UNICODE}\nother:x\n")
    text = render(
        "celery_flower/flowerconfig.py.j2",
        celery_flower_options=options,
        celery_flower_read_only=True,
        site_monitor_uses_rabbitmq=False,
    )
    found: dict[str, Any] = {}
    exec(compile(text, "flowerconfig.py", "exec"), found)

    assert {name: found[name] for name in options} == options
    assert found["basic_auth"] == [f"person:{ASCII}{UNICODE}", "other:x"]
    assert found["read_only"] is True


def test_ssh_reads_back_names_of_files(tmp_path: Path) -> None:
    texts = [text for text in carried(escape.ssh_config_quote) if not text.startswith("~")]
    lines = [f"  IdentityFile {escape.ssh_config_quote('/x/' + text)}" for text in texts]
    for begin in range(0, len(lines), 90):  # it takes no more than 100
        (tmp_path / "ssh_config").write_text("\n".join(["Host *", *lines[begin : begin + 90]]))
        shown = subprocess.run(["ssh", "-G", "-F", tmp_path / "ssh_config", "host"], capture_output=True, check=True).stdout.decode()
        read = [line.removeprefix("identityfile ") for line in shown.splitlines() if line.startswith("identityfile ")]
        # ssh -G does not resolve tokens.
        assert [line.replace("%%", "%") for line in read] == list(dict.fromkeys("/x/" + text for text in texts[begin : begin + 90]))


def test_logrotate_takes_the_file(tmp_path: Path) -> None:
    text = render("celery_app/logrotate.j2", celery_app_user="root", site_app_logs=str(tmp_path))
    (tmp_path / "logrotate.conf").write_text(text)
    (tmp_path / "a.log").write_text("line\n")

    done = subprocess.run(["logrotate", "-d", tmp_path / "logrotate.conf"], capture_output=True, text=True, check=True)
    assert "error" not in done.stderr
    assert "considering log" in done.stderr + done.stdout


# --- Every value of every template ---

#: What a template may be written with, by its file: the filters of its syntax.
SYNTAXES: dict[str, set[str]] = {
    "*/users.acl.j2": {"redis_acl_word"},
    "*/sentinel-users.acl.j2": {"redis_acl_word"},
    "redis*/celery-platform*.j2": {"redis_quote"},
    "rabbitmq/rabbitmq.conf.j2": {"rabbitmq_conf_value"},
    "rabbitmq/nodes.conf.j2": {"rabbitmq_conf_value"},
    "rabbitmq/inetrc.j2": {"erlang_string"},
    "rabbitmq/*.config.j2": {"erlang_string"},
    "*/*.env.j2": {"environment_file"},
    "*/nginx.conf.j2": {"nginx_quote"},
    "*/index.html.j2": {"e"},
    "*/htpasswd.j2": {"password_hash"},
    "*/flowerconfig.py.j2": {"to_json"},
    "*/*.yml.j2": {"yaml_quote", "to_json"},
    "*/pace.j2": {"yaml_quote"},
    "*/*.service.j2": {"systemd_value", "systemd_exec_arg"},
    "*/*.conf.j2": {"systemd_value", "systemd_exec_arg"},
    "exporters/redis-service.j2": {"systemd_exec_arg"},
}
#: What needs none, in any syntax, and why.
PLAIN = {
    # The roles' preflights allow letters, digits and a few signs; numbers; or one of a few words.
    *("celery_app_home", "celery_app_name", "celery_app_user", "pki_group", "rabbitmq_plugins"),
    *("celery_app_settings.log_level", "celery_app_settings.redis_transport", "worker.pool", "user.name", "name"),
    *("worker.concurrency", "worker.cpu_weight", "worker.max_memory_per_child", "worker[]", "item.port", "database"),
    # plugins/filter/flows.py has checked them; inetrc and epmd.conf test for an IPv4 address.
    *("flow.name", "flow.protocol", "flow.port", "flow.ipv4", "flow.ipv6", "address", "rabbitmq_address"),
    # Of the role itself, or set in the template, where what they are made of is looked at.
    *(
        "ansible_managed",
        "backend.name",
        "backend.path",
        "backend.what",
        "backend.address",
        "capability",
        "collector",
        "directive",
        "here",
        "kind",
    ),
    *("…[]", "ansible_facts[]", "interface", "options", "passwords", "prefix", "service", "tls", "type"),
    # Lines of the program's own language, which people write: redis_settings, redis_users[].commands, firewall_extra_rules.
    *("value", "user.commands", "rule"),
}
SAFE_FILTERS = {"int", "length", "hash", "bool", "comment"}


@functools.cache
def typed_options() -> set[str]:
    """Return the names of all settings that are numbers, yes or no, or one of a few words."""
    files = (REPOSITORY / "roles").glob("*/meta/argument_specs.yml")
    options = [option for file in files for option in yaml.safe_load(file.read_text())["argument_specs"].popitem()[1]["options"].items()]
    return {name for name, option in options if option["type"] in ("int", "float", "bool") or "choices" in option}


def written(node: nodes.Node, filters: set[str], ready: set[str]) -> Iterator[str]:
    """Yield what an expression of a template writes without a filter of its syntax; `ready` is what needs none."""
    match node:
        case nodes.Const() | nodes.TemplateData() | nodes.Compare() | nodes.Test() | nodes.Not():
            pass
        case nodes.Filter(name="join", node=nodes.Filter(name="map", args=[nodes.Const(value=name), *_])) if name in filters | SAFE_FILTERS:
            pass
        case nodes.Filter():
            if node.name not in filters | SAFE_FILTERS and node.node:
                yield from written(node.node, filters, ready)
        case nodes.Call(node=nodes.Name(name=name)) if name in ready:
            pass
        case nodes.Name() | nodes.Getattr() | nodes.Getitem():
            name = dotted(node)
            if name.partition(".")[0] not in ready and not re.fullmatch(r"(__|site_)\w+(\[\])?|loop[.]\w+", name):
                yield name
        case _:
            for child in node.iter_child_nodes():
                yield from written(child, filters, ready)


def dotted(node: nodes.Node) -> str:
    match node:
        case nodes.Name():
            return node.name
        case nodes.Getattr():
            return f"{dotted(node.node)}.{node.attr}"
        case nodes.Getitem():
            return f"{dotted(node.node)}[]"
    return "…"


TEMPLATES = {
    str(path.relative_to(REPOSITORY / "roles")).replace("templates/", ""): path for path in REPOSITORY.glob("roles/*/templates/**/*.j2")
}


@pytest.mark.parametrize("template", sorted(TEMPLATES))
def test_every_value_of_a_template_is_escaped_for_its_syntax(template: str) -> None:
    filters = next((filters for pattern, filters in SYNTAXES.items() if fnmatch.fnmatch(template, pattern)), set())
    text = TEMPLATES[template].read_text()
    parsed = jinja2.Environment(**(OTHER_DELIMITERS if "<<" in text else {})).parse(text)
    macros = {macro.name for macro in parsed.find_all(nodes.Macro)}
    macros |= {str(name) for line in parsed.find_all(nodes.FromImport) for name in line.names}
    outputs = [node for output in parsed.find_all(nodes.Output) for node in output.nodes]

    found = {name for node in outputs for name in written(node, filters, macros | typed_options())}
    assert found - PLAIN == set()
