"use strict";
// The state of the site, for the start page: what fires (Alertmanager), and how many workers are up (Prometheus).

const REFRESH_SECONDS = 15;
// Alerts by how urgent they are, as the runbooks say it. Others, such as Watchdog, are for machines.
const SEVERITIES = ["page", "ticket"];
const state = document.getElementById("state");

async function ask(path) {
  const answer = await fetch(path, { signal: AbortSignal.timeout(10000) });
  if (!answer.ok) throw new Error(`${path.split("?")[0]} answers ${answer.status}`);
  return answer.json();
}

const number = (query) => ask("/prometheus/api/v1/query?" + new URLSearchParams({ query })).then(({ data }) => Number(data.result[0]?.value[1] ?? 0));

function element(name, text, className = "") {
  return Object.assign(document.createElement(name), { textContent: text, className });
}

function item({ labels, annotations }) {
  const made = document.createElement("li");
  const link = element("a", labels.alertname);
  // It comes from a rule; a link to a script must not become one here.
  if (/^https?:\/\//.test(annotations.runbook_url)) link.href = annotations.runbook_url;
  made.append(element("span", labels.severity, `severity ${labels.severity}`), " ", link, " ", annotations.summary ?? "");
  return made;
}

const count = (many, one) => `${many} ${one}${many === 1 ? "" : "s"}`;

async function show() {
  const [alerts, up, known] = await Promise.all([
    ask("/alertmanager/api/v2/alerts?active=true&silenced=false&inhibited=false"),
    number("sum(celery_worker_up)"),
    number("count(celery_worker_up)"),
  ]);
  const firing = alerts.filter(({ labels }) => SEVERITIES.includes(labels.severity))
    .sort((one, other) => SEVERITIES.indexOf(one.labels.severity) - SEVERITIES.indexOf(other.labels.severity) || one.labels.alertname.localeCompare(other.labels.alertname));
  state.className = `state ${firing[0]?.labels.severity ?? "good"}`;
  state.querySelector("h2").textContent = firing.length ? `${count(firing.length, "alert")} firing` : "No alert is firing";
  state.querySelector("p").textContent = `${up} of ${count(known, "worker")} up, as of ${new Date().toLocaleTimeString([], { hour12: false })}`;
  state.querySelector("ul").replaceChildren(...firing.map(item));
}

function fail(error) {
  state.className = "state page";
  state.querySelector("h2").textContent = "The state is not known";
  state.querySelector("p").textContent = error.message;
  state.querySelector("ul").replaceChildren();
}

const refresh = () => document.hidden || show().catch(fail);
refresh();
setInterval(refresh, REFRESH_SECONDS * 1000);
document.addEventListener("visibilitychange", refresh);
