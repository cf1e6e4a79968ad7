"use strict";
// Draws the dashboards, which are Grafana's JSON, from Prometheus: the kinds of panels that they use, and no others.

const DASHBOARDS = ["overview", "workers", "brokers"];
const PROMETHEUS = "/prometheus/api/v1/";
const RATE_INTERVAL = "1m";
const REFRESH_SECONDS = 30;
const POINTS = 240;
const COLORS = ["#73bf69", "#f2cc0c", "#5794f2", "#ff9830", "#f2495c", "#b877d9", "#8ab8ff", "#fade2a", "#96d98d", "#ff7383", "#ca95e5", "#ffb357"];
const NAMED = { green: "#37872d", orange: "#c4622d", red: "#c4162a" };
const UNITS = { percent: [[1, "%"]], ops: [[1, "/s"]], s: [[86400, " d"], [3600, " h"], [60, " min"], [1, " s"], [0.001, " ms"]] };
const LARGE = [[1e9, " G"], [1e6, " M"], [1e4, " K", 1e3], [1, ""]];

const $ = (id) => document.getElementById(id);
const chosen = {};
let charts = [];
let current;

function element(name, text, ...classes) {
  const made = document.createElement(name);
  if (text !== undefined) made.textContent = text;
  made.classList.add(...classes);
  return made;
}

function written(value, unit, decimals) {
  if (value === undefined || Number.isNaN(value)) return "–";
  const scale = UNITS[unit] ?? (unit === "locale" ? [[1, ""]] : LARGE);
  const [from, suffix, by] = scale.find(([least]) => Math.abs(value) >= least) ?? scale.at(-1);
  const shown = value / (by ?? from);
  const places = decimals ?? (Number.isInteger(shown) || Math.abs(shown) >= 100 ? 0 : Math.abs(shown) >= 10 ? 1 : 2);
  return shown.toFixed(places) + suffix;
}

function color(value, thresholds) {
  const passed = thresholds.steps.filter((step) => step.value === null || value >= step.value);
  return NAMED[passed.at(-1).color];
}

async function ask(path, parameters) {
  const answer = await fetch(PROMETHEUS + path + "?" + new URLSearchParams(parameters));
  const told = await answer.json().catch(() => ({ error: answer.statusText }));
  if (told.status !== "success") throw new Error(told.error);
  return told.data;
}

function query(expression) {
  return Object.entries(chosen).reduce((text, [name, value]) => text.replaceAll("$" + name, value), expression.replaceAll("$__rate_interval", RATE_INTERVAL));
}

const instant = async (target) => (await ask("query", { query: query(target.expr) })).result;

async function range(target) {
  const end = Math.floor(Date.now() / 1000);
  const seconds = Number($("range").value);
  const step = Math.max(15, Math.round(seconds / POINTS));
  const { result } = await ask("query_range", { query: query(target.expr), start: end - seconds, end, step });
  return result.map(({ metric, values }) => ({ metric, points: values.flatMap(([when, value], index) => {
    const point = { x: when * 1000, y: Number(value) };
    // A line across a time without values would be made up.
    return index && when - values[index - 1][0] > 4 * step ? [{ x: point.x - 1, y: NaN }, point] : [point];
  }) }));
}

function name(target, labels) {
  if (target.legendFormat === "__auto") return Object.values(labels).join(" ") || target.expr;
  return target.legendFormat.replace(/{{(\w+)}}/g, (_, label) => labels[label] ?? "").trim();
}

const DRAW = {
  row: async () => [],

  async stat(panel) {
    const [found] = await instant(panel.targets[0]);
    if (!found) return [];
    const value = Number(found.value[1]);
    const { unit, decimals, thresholds } = panel.fieldConfig.defaults;
    const shown = element("div", written(value, unit, decimals), "value");
    shown.style.background = color(value, thresholds);
    return [shown];
  },

  async table(panel) {
    const columns = panel.fieldConfig.overrides.map(({ matcher, properties }) => ({
      field: matcher.options, ...Object.fromEntries(properties.map(({ id, value }) => [id, value])),
    }));
    const labels = columns.map(({ field }) => field).filter((field) => !field.startsWith("Value"));
    const rows = new Map();
    for (const target of panel.targets) {
      const field = panel.targets.length > 1 ? "Value #" + target.refId : "Value";
      for (const { metric, value } of await instant(target)) {
        // What a query does not tell apart belongs to every row that it fits.
        const known = labels.filter((label) => label in metric);
        const fitting = [...rows.values()].filter((row) => known.every((label) => row[label] === metric[label]));
        const all = fitting.length && known.length < labels.length ? fitting : [rows.get(known.map((label) => metric[label]).join()) ?? {}];
        for (const row of all) {
          for (const label of known) row[label] = metric[label];
          row[field] = Number(value[1]);
          rows.set(labels.map((label) => row[label]).join(), row);
        }
      }
    }
    if (!rows.size) return [];
    const head = element("tr");
    head.append(...columns.map(({ displayName }) => element("th", displayName)));
    const table = element("table");
    table.append(head);
    for (const [, row] of [...rows].sort(([one], [other]) => one.localeCompare(other))) {
      const line = element("tr");
      for (const { field, unit, thresholds } of columns) {
        const value = row[field];
        const cell = element("td", typeof value === "number" || field.startsWith("Value") ? written(value, unit) : value);
        if (thresholds && value !== undefined) cell.style.background = color(value, thresholds);
        line.append(cell);
      }
      table.append(line);
    }
    const scroll = element("div", undefined, "scroll");
    scroll.append(table);
    return [scroll];
  },

  async timeseries(panel) {
    const { unit, min, max } = panel.fieldConfig.defaults;
    const datasets = [];
    for (const target of panel.targets) {
      for (const { metric, points } of await range(target)) datasets.push({ label: name(target, metric), data: points });
    }
    if (!datasets.length) return [];
    datasets.sort((one, other) => (other.data.at(-1).y || 0) - (one.data.at(-1).y || 0));
    datasets.forEach((set, index) => Object.assign(set, { borderColor: COLORS[index % COLORS.length], backgroundColor: COLORS[index % COLORS.length] + "18", label: `${set.label}  ${written(set.data.at(-1).y, unit)}` }));
    const plot = element("div", undefined, "plot");
    const canvas = element("canvas");
    plot.append(canvas);
    const now = Date.now();
    charts.push([canvas, {
      type: "line",
      data: { datasets },
      options: {
        animation: false, maintainAspectRatio: false, parsing: false, normalized: true, borderWidth: 1.5, fill: datasets.length === 1,
        interaction: { mode: "nearest", axis: "x", intersect: false },
        elements: { point: { radius: 0 } },
        scales: {
          x: { type: "linear", min: now - $("range").value * 1000, max: now, grid: { color: "#22252b" },
            ticks: { color: "#8e8e9b", maxTicksLimit: 7, maxRotation: 0, callback: time } },
          y: { min, suggestedMax: max, grid: { color: "#22252b" }, ticks: { color: "#8e8e9b", maxTicksLimit: 6, callback: (value) => written(value, unit) } },
        },
        plugins: {
          legend: { position: "bottom", align: "start", labels: { color: "#ccccdc", boxWidth: 12, boxHeight: 2, padding: 8, font: { size: 11 } } },
          tooltip: { callbacks: { title: ([item]) => new Date(item.parsed.x).toLocaleString(), label: ({ dataset, parsed }) => `${dataset.label.split("  ")[0]}: ${written(parsed.y, unit)}` } },
        },
      },
    }]);
    return [plot];
  },
};

function time(value) {
  const moment = new Date(value);
  const clock = moment.toLocaleTimeString([], { hour: "2-digit", minute: "2-digit", hour12: false });
  return $("range").value > 86400 ? moment.toLocaleDateString([], { day: "numeric", month: "short" }) : clock;
}

// A row whose panels are all empty is of a broker that the site does not have: one that is down still has its targets.
function place(drawn) {
  const rows = [];
  for (const one of drawn) {
    if (one.panel.type === "row" || !rows.length) rows.push([]);
    rows.at(-1).push(one);
  }
  let saved = 0;
  return rows.flatMap((row) => {
    const left = row[0].panel.type === "row" && row.slice(1).every(({ empty }) => empty);
    for (const { section, panel: { gridPos: { x, y, w, h } } } of row) section.style.gridArea = `${y - saved + 1} / ${x + 1} / span ${h} / span ${w}`;
    if (left) saved += Math.max(...row.map(({ panel: { gridPos: { y, h } } }) => y + h)) - row[0].panel.gridPos.y;
    return left ? [] : row;
  });
}

async function draw() {
  const wrong = [];
  const old = charts.map(([, , chart]) => chart);
  charts = [];
  const drawn = await Promise.all(current.panels.map(async (panel) => {
    const section = element("section", undefined, panel.type);
    let empty = false;
    const title = element("h2", panel.title);
    title.title = panel.description ?? "";
    section.append(title);
    try {
      const content = await DRAW[panel.type](panel);
      empty = !content.length && panel.type !== "row";
      section.append(...(empty ? [element("div", "No data", "none")] : content));
    } catch (error) {
      wrong.push(`${panel.title}: ${error.message}`);
      section.append(element("div", error.message, "none"));
    }
    return { panel, section, empty };
  }));
  const shown = place(drawn);
  $("panels").replaceChildren(...shown.map(({ section }) => section));
  old.forEach((chart) => chart.destroy());
  charts.forEach((entry) => entry.push(new Chart(entry[0], entry[1])));
  $("state").classList.toggle("wrong", wrong.length > 0);
  $("state").textContent = wrong.length ? wrong[0] : `as of ${new Date().toLocaleTimeString([], { hour12: false })}`;
  document.body.dataset.drawn = JSON.stringify({ panels: shown.length, empty: shown.filter(({ empty }) => empty).map(({ panel }) => panel.title), wrong });
}

async function variables() {
  $("variables").replaceChildren();
  for (const variable of current.templating.list.filter(({ type }) => type === "query")) {
    const [, metric, label] = variable.query.query.match(/^label_values\((\w+), (\w+)\)$/);
    const select = element("select");
    select.title = select.ariaLabel = variable.label;
    select.append(new Option(`all ${variable.label.toLowerCase()}s`, ".*"));
    for (const value of await ask(`label/${label}/values`, { "match[]": metric })) select.append(new Option(value, value));
    chosen[variable.name] = ".*";
    select.onchange = () => { chosen[variable.name] = select.value; draw(); };
    $("variables").append(select);
  }
}

async function open() {
  const wanted = DASHBOARDS.find((dashboard) => location.hash === "#" + dashboard) ?? DASHBOARDS[0];
  current = await (await fetch(`${wanted}.json`)).json();
  document.title = current.title;
  document.querySelectorAll("nav a").forEach((link) => link.classList.toggle("here", link.hash === "#" + wanted));
  await variables();
  await draw();
}

for (const dashboard of DASHBOARDS) {
  const link = element("a", dashboard[0].toUpperCase() + dashboard.slice(1));
  link.href = "#" + dashboard;
  $("dashboards").append(link);
}
$("range").onchange = draw;
window.onhashchange = open;
setInterval(() => document.hidden || draw(), REFRESH_SECONDS * 1000);
open().catch((error) => { $("state").classList.add("wrong"); $("state").textContent = error.message; });
