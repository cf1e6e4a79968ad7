"use strict";
// The state of the site, for the start page: what fires (Alertmanager), and how many workers are up (Prometheus).

const REFRESH_SECONDS = 15;
// Alerts by how urgent they are, as the runbooks say it. Others, such as Watchdog, are for machines.
const SEVERITIES = ["page", "ticket"];
const ALERTMANAGER = "/alertmanager/api/v2/";
const SILENCE_HOURS = 4;
const state = document.getElementById("state");

async function ask(path, options = {}) {
  const answer = await fetch(path, { signal: AbortSignal.timeout(10000), ...options });
  if (!answer.ok) throw new Error(`${path.split("?")[0]} answers ${answer.status}`);
  return answer.headers.get("Content-Type")?.includes("json") ? answer.json() : null;
}

const number = (query) => ask("/prometheus/api/v1/query?" + new URLSearchParams({ query })).then(({ data }) => Number(data.result[0]?.value[1] ?? 0));

function element(name, text, className = "") {
  return Object.assign(document.createElement(name), { textContent: text, className });
}

// Silences hold for exactly the alert's labels. Who made one is in the proxy's journal.
function silence({ labels }) {
  const now = Date.now();
  return ask(ALERTMANAGER + "silences", {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify({
      matchers: Object.entries(labels).map(([name, value]) => ({ name, value, isRegex: false, isEqual: true })),
      startsAt: new Date(now).toISOString(),
      endsAt: new Date(now + SILENCE_HOURS * 3600 * 1000).toISOString(),
      createdBy: "start page",
      comment: `for ${SILENCE_HOURS} hours`,
    }),
  });
}

const unsilence = ({ status }) => Promise.all(status.silencedBy.map((id) => ask(`${ALERTMANAGER}silence/${id}`, { method: "DELETE" })));

function item(alert) {
  const { labels, annotations, status } = alert;
  const silenced = status.silencedBy.length > 0;
  const made = document.createElement("li");
  const link = element("a", labels.alertname);
  // It comes from a rule; a link to a script must not become one here.
  if (/^https?:\/\//.test(annotations.runbook_url)) link.href = annotations.runbook_url;
  const button = element("button", silenced ? "End the silence" : `Silence for ${SILENCE_HOURS} hours`, "copy");
  button.type = "button";
  button.setAttribute("aria-label", `${button.textContent}: ${labels.alertname}`);
  button.onclick = () => (silenced ? unsilence(alert) : silence(alert)).then(show).catch(fail);
  const severity = element("span", silenced ? "silenced" : labels.severity, silenced ? "severity" : `severity ${labels.severity}`);
  made.append(severity, " ", link, " ", annotations.summary ?? "", " ", button);
  return made;
}

const count = (many, one) => `${many} ${one}${many === 1 ? "" : "s"}`;

async function show() {
  const [alerts, up, workers] = await Promise.all([
    ask(ALERTMANAGER + "alerts?inhibited=false"),
    number("sum(celery_worker_up)"),
    number("count(celery_worker_up)"),
  ]);
  const known = alerts.filter(({ labels }) => SEVERITIES.includes(labels.severity))
    .sort((one, other) => SEVERITIES.indexOf(one.labels.severity) - SEVERITIES.indexOf(other.labels.severity) || one.labels.alertname.localeCompare(other.labels.alertname));
  const [firing, silenced] = [false, true].map((wanted) => known.filter(({ status }) => status.silencedBy.length > 0 === wanted));
  state.className = `state ${firing[0]?.labels.severity ?? "good"}`;
  state.querySelector("h2").textContent = firing.length ? `${count(firing.length, "alert")} firing` : "No alert is firing";
  state.querySelector("p").textContent = `${up} of ${count(workers, "worker")} up, as of ${new Date().toLocaleTimeString([], { hour12: false })}`;
  state.querySelector("ul").replaceChildren(...firing.concat(silenced).map(item));
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
