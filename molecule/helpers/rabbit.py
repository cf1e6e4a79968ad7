"""A site's RabbitMQ nodes, as tests see them from outside."""

from __future__ import annotations

import json
import ssl
from pathlib import Path
from typing import Any

import amqp

from helpers.cluster import Cluster
from helpers.nodes import wait_for

AMQPS, METRICS, DISTRIBUTION = 5671, 15691, 25672
VHOST = "orders"
SERVICE = "rabbitmq-server"


class RabbitCluster(Cluster):
    """The Redis hosts, which are the nodes of RabbitMQ as well."""

    def ctl(self, name: str, command: str) -> str:
        """Run a command of rabbitmqctl on a host; return what it prints."""
        return str(self.nodes[name].host.check_output(f"rabbitmqctl --silent {command}"))

    def ask(self, name: str, command: str) -> Any:
        """Return what a command of rabbitmqctl prints as JSON."""
        return json.loads(self.ctl(name, f"{command} --formatter=json"))

    def running(self, name: str) -> set[str]:
        """Return the hosts whose nodes run, as one of them sees it; none if that one does not."""
        shown = self.nodes[name].host.run("rabbitmqctl --silent cluster_status --formatter=json")
        return {node.removeprefix("rabbit@") for node in json.loads(shown.stdout)["running_nodes"]} if shown.rc == 0 else set()

    def whole(self, *names: str) -> None:
        """Wait until the nodes of these hosts, or all, form a cluster, and no queue lacks a member."""
        wanted = set(names or self.nodes)

        def complete() -> bool:
            return all(self.running(name) == wanted for name in wanted) and all(
                set(queue["online"]) == {f"rabbit@{name}" for name in wanted} for queue in self.queues(min(wanted))
            )

        wait_for("a whole cluster", complete, seconds=120, every=1)

    def queues(self, name: str) -> list[dict[str, Any]]:
        """Return the quorum queues of the application as a host's node sees them: name, leader, members, online, messages."""
        queues = self.ask(name, f"list_queues --vhost={VHOST} name type leader members online messages")
        return [queue for queue in queues if queue["type"] == "quorum"]

    def leader(self, queue: str) -> str:
        """Return the host whose node leads a queue."""
        name = next(name for name in self.nodes if self.running(name))
        return str(next(q["leader"] for q in self.queues(name) if q["name"] == queue)).removeprefix("rabbit@")

    def connect(
        self,
        name: str,
        user: str = "orders",
        password: str = "",
        server_name: str = "",
        certificate: tuple[Path, Path] | None = None,
        **options: Any,
    ) -> amqp.Connection:
        """Return a connection to a host's node, over TLS with a certificate; it checks the host's name, or another."""
        node = self.nodes[name]
        files = certificate or self.certificate
        tls: dict[str, Any] = {
            "ca_certs": str(self.authority),
            "certfile": str(files[0]),
            "keyfile": str(files[1]),
            "cert_reqs": ssl.CERT_REQUIRED,
            "server_hostname": server_name or node.address,
        }
        connection = amqp.Connection(
            **{
                "host": f"{node.address}:{AMQPS}",
                "userid": user,
                "password": password or self.secrets["vault_celery_app_rabbitmq_password"],
                "virtual_host": VHOST,
                "ssl": tls,
                "connect_timeout": 5,
                "read_timeout": 10,
            }
            | options
        )
        connection.connect()
        return connection
