"""Filters that write a value into another program's syntax, so that the program reads back just this value.

One filter for each syntax. What a syntax cannot carry is an error here; the roles' preflights refuse it before, by the
variable's name. YAML is written by `yaml_quote`, JSON by `to_json`, HTML by `e`, and a POSIX shell's words by `quote`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

from ansible.errors import AnsibleFilterError

#: What no configuration file carries as itself: C0 and C1 controls, DEL, and Unicode's separators of lines and paragraphs.
CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")
#: What is part of a key's pattern, or ends a word, in an ACL file.
ACL_SPECIAL = re.compile(CONTROL.pattern + r"|[\s*?\[\]\\^()]")

#: What systemd takes into no environment.
NOT_IN_ENVIRONMENT = re.compile(
    r"[\x00\ud800-\udfff\ufdd0-\ufdef" + "".join(rf"\U{plane << 16 | 0xFFFE:08x}\U{plane << 16 | 0xFFFF:08x}" for plane in range(17)) + "]"
)


def _checked(value: Any, syntax: str, refused: re.Pattern[str] = CONTROL) -> str:
    """Return a value as text.

    Raises:
        AnsibleFilterError: if it holds a character that the syntax cannot carry. The value is not shown.
    """
    text = str(value)
    if found := refused.search(text):
        raise AnsibleFilterError(f"{syntax} cannot hold the character {found[0]!r}")
    return text


def redis_quote(value: Any) -> str:
    r"""Return one word of redis.conf or sentinel.conf.

    In double quotes only `\` and `"` are special (sdssplitargs in Redis's sds.c).

    Raises:
        AnsibleFilterError: for control characters.
    """
    return '"' + re.sub(r'(["\\])', r"\\\1", _checked(value, "redis.conf")) + '"'


def redis_acl_word(value: Any) -> str:
    r"""Return a user's name, or what keys begin with, as an ACL file holds it.

    The file has no quotes: words end at blanks (ACLLoadFromFile and ACLStringHasSpaces in Redis's acl.c). In a pattern
    `*?[]^\` stand for others, and clients subscribe to patterns only by the letter.

    Raises:
        AnsibleFilterError: for nothing, for blanks, and for what is special in patterns and selectors.
    """
    if not str(value):
        raise AnsibleFilterError("an ACL file cannot hold an empty word")
    return _checked(value, "an ACL file", ACL_SPECIAL)


def rabbitmq_conf_value(value: Any) -> str:
    """Return the value of a setting in rabbitmq.conf; yes and no as `true` and `false`.

    It ends at `#` or the end of the line, without the blanks around it, and `$(name)` is replaced by another setting's value.
    Only newer releases know quotes, and characters beyond Latin-1. (cuttlefish: conf_parse.peg, cuttlefish_generator.erl)

    Raises:
        AnsibleFilterError: for control characters, nothing, `#`, `$(`, a leading single quote, blanks at either end, and
            characters beyond Latin-1.
    """
    text = _checked(value, "rabbitmq.conf", re.compile(CONTROL.pattern + r"|#|\$\(|^'|^\s|\s$|^$|[^\x00-\xff]"))
    return text.lower() if isinstance(value, bool) else text


def erlang_string(value: Any) -> str:
    r"""Return a string of an Erlang term: `\` and `"` are escaped (Erlang reference manual, "Escape sequences").

    Raises:
        AnsibleFilterError: for control characters.
    """
    return '"' + re.sub(r'(["\\])', r"\\\1", _checked(value, "an Erlang term")) + '"'


def systemd_value(value: Any) -> str:
    r"""Return the value of a unit's setting that is one text, such as Description=.

    `%` begins a specifier (systemd.unit, "Specifiers"). Blanks at the ends are cut, and a `\` at the end of a line joins
    it with the next one (systemd.syntax).

    Raises:
        AnsibleFilterError: for control characters, blanks at either end, and a `\` at the end.
    """
    return _checked(value, "a setting of a unit", re.compile(CONTROL.pattern + r"|^\s|\s$|\\$")).replace("%", "%%")


def systemd_exec_arg(value: Any) -> str:
    r"""Return an argument, or a part of one, of a unit's ExecStart= (not the program itself, where `$` stays as it is).

    `%` begins a specifier and `$` a variable; they are doubled. What ends a word, a quote or a command is written as `\xHH`
    (systemd.service, "Command lines"; systemd.syntax, "Quoting"). Escaped rather than quoted, it can follow `--option=`.

    Raises:
        AnsibleFilterError: for control characters, and for nothing.
    """
    if not str(value):
        raise AnsibleFilterError("a part of ExecStart= cannot be empty")
    doubled = re.sub(r"[%$]", r"\g<0>\g<0>", _checked(value, "ExecStart="))
    return re.sub(r"[\s\"'\\;]", lambda found: "".join(f"\\x{byte:02x}" for byte in found[0].encode()), doubled)


def environment_file(value: Any) -> str:
    r"""Return the value of a variable in a file for a unit's EnvironmentFile=.

    In double quotes a `\` keeps `"`, `\`, `` ` `` and `$` as they are, and all else stands for itself, line ends and other control
    characters, too (parse_env_file in systemd's env-file.c). A file with what is no character in Unicode systemd does not read
    (unichar_is_valid in its utf8.c).

    Raises:
        AnsibleFilterError: for what is no text, for NUL, and for what is no character, such as half of a pair.
    """
    if not isinstance(value, str):
        raise AnsibleFilterError("an environment file holds texts")
    text = _checked(value, "an environment file", NOT_IN_ENVIRONMENT)
    return '"' + re.sub(r'(["\\`$])', r"\\\1", text) + '"'


def nginx_quote(value: Any) -> str:
    r"""Return one parameter in nginx's configuration.

    In double quotes only `\` and `"` are special (ngx_conf_read_token in nginx's ngx_conf_file.c), but many parameters
    take variables, and nothing keeps a `$` from beginning one.

    Raises:
        AnsibleFilterError: for control characters and `$`.
    """
    return '"' + re.sub(r'(["\\])', r"\\\1", _checked(value, "nginx.conf", re.compile(CONTROL.pattern + r"|\$"))) + '"'


def yaml_quote(value: Any) -> str:
    r"""Return a text as a scalar of YAML that stays a text, whatever it looks like (`no`, `12`, `null`).

    A string of JSON is one of YAML (YAML 1.2, 1.3), if characters beyond 16 bits are not written as two (`\ud83d\ude00`).

    Raises:
        AnsibleFilterError: for control characters.
    """
    return json.dumps(_checked(value, "YAML"), ensure_ascii=False)


def ssh_config_quote(value: Any) -> str:
    r"""Return a file's name in ssh_config.

    In double quotes `\` keeps `"` and `\` (argv_split in OpenSSH's misc.c); `%` begins a token, and `${` names a variable of the
    environment (ssh_config, "TOKENS" and "ENVIRONMENT VARIABLES").

    Raises:
        AnsibleFilterError: for control characters and `${`.
    """
    text = _checked(value, "ssh_config", re.compile(CONTROL.pattern + r"|\$\{")).replace("%", "%%")
    return '"' + re.sub(r'(["\\])', r"\\\1", text) + '"'


class FilterModule:
    """What Ansible looks for in this file."""

    def filters(self) -> dict[str, Callable[[Any], str]]:
        """Return the filters by name."""
        return {
            filter_.__name__: filter_
            for filter_ in (
                redis_quote,
                redis_acl_word,
                rabbitmq_conf_value,
                erlang_string,
                systemd_value,
                systemd_exec_arg,
                environment_file,
                nginx_quote,
                yaml_quote,
                ssh_config_quote,
            )
        }
