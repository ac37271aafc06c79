// Example viewer: filters, pages and draws the predictions embedded in the page as JSON. No library, no network.
"use strict";
(() => {
  const root = document.getElementById("browser");
  const data = JSON.parse(document.getElementById("predictions").textContent);
  const variables = JSON.parse(root.dataset.variables); // method -> CSS variable of its colour
  const field = (name) => root.querySelector(`[name="${name}"]`);
  const part = (name) => root.querySelector(`[data-part="${name}"]`);
  const predictions = data.predictions.map(([evaluation, problem, steps, ending, correct, cause, wrong, tokens, stopped]) =>
    ({ evaluation, problem, steps, ending, correct: !!correct, cause, wrong, tokens, stopped }));
  const byEvaluation = new Map(predictions.map((p) => [`${p.evaluation} ${p.problem}`, p]));
  const words = predictions.map((p) => {
    const problem = data.problems[p.problem];
    return [problem.id, problem.question, problem.gold, ...p.steps.flatMap(([question, line]) => [question, line]), p.ending].join(" ").toLowerCase();
  });
  let found = [];
  let at = 0;

  // Texts of models are inserted as text, never as HTML.
  function element(tag, kind, ...children) {
    const made = document.createElement(tag);
    if (kind) made.className = kind;
    made.append(...children);
    return made;
  }

  function options(select, all, entries) {
    const before = select.value;
    select.replaceChildren(...(all ? [new Option(all, "")] : []), ...entries.map(([value, text]) => new Option(text, value)));
    if ([...select.options].some((option) => option.value === before)) select.value = before;
    select.closest("label").hidden = entries.length < 2 && select.name !== "other";
  }

  function seedText(evaluation) {
    return evaluation.seed === null ? "no seed" : `seed ${evaluation.seed}`;
  }

  // Options that occur in the selected data set, each once and in the order of the report.
  function choices() {
    const here = data.evaluations.filter((e) => e.problems === field("problems").value);
    const unique = (entries) => [...new Map(entries).entries()];
    options(field("model"), "all models", unique(here.map((e) => [e.model, e.model])));
    options(field("method"), "all methods", unique(here.map((e) => [e.method, e.label])));
    options(field("seed"), "all seeds", unique(here.map((e) => [String(e.seed), seedText(e)])));
    const others = data.evaluations.map((e, index) => [String(index), `${e.model}, ${e.label}, ${seedText(e)}`, e]);
    options(field("other"), "none", others.filter(([, , e]) => e.problems === field("problems").value));
    const inSet = predictions.filter((p) => data.evaluations[p.evaluation].problems === field("problems").value);
    const nums = new Set(inSet.map((p) => (data.problems[p.problem].steps || []).length));
    options(field("steps"), "any number", [...nums].sort((a, b) => a - b).map((n) => [String(n), `${n} step${n === 1 ? "" : "s"}`]));
    const causes = Object.entries(data.causes).filter(([cause]) => cause !== "right" && inSet.some((p) => p.cause === cause));
    options(field("cause"), "any cause", causes);
  }

  function filter() {
    const wanted = (name) => field(name).value;
    const search = wanted("search").trim().toLowerCase();
    found = predictions.filter((p, index) => {
      const evaluation = data.evaluations[p.evaluation];
      return evaluation.problems === wanted("problems")
        && (!wanted("model") || evaluation.model === wanted("model"))
        && (!wanted("method") || evaluation.method === wanted("method"))
        && (!wanted("seed") || String(evaluation.seed) === wanted("seed"))
        && (!wanted("result") || p.correct === (wanted("result") === "right"))
        && (!wanted("cause") || p.cause === wanted("cause"))
        && (!wanted("steps") || String((data.problems[p.problem].steps || []).length) === wanted("steps"))
        && (!search || words[index].includes(search));
    });
    found.sort((a, b) => a.problem - b.problem || a.evaluation - b.evaluation);
    at = 0;
    show();
  }

  // "9*2 = <<9*2=18>>18 dollars": the expression dimmed, the result marked as the calculator's or the model's.
  // computed: for each annotation, whether its result is the calculator's.
  function marked(text, computed, calculator) {
    const pieces = [];
    let end = 0;
    let index = 0;
    for (const match of text.matchAll(/<<([^<>=]*)=([^<>]*)>>/g)) {
      pieces.push(text.slice(end, match.index));
      const byCalculator = calculator && computed[index++];
      const result = element("mark", byCalculator ? "by-calculator" : "by-hand", match[2]);
      result.title = byCalculator ? "written by the calculator" : "written by the model";
      pieces.push(element("span", "annotation", `⟨${match[1]} = `, result, "⟩"));
      end = match.index + match[0].length;
    }
    return [...pieces, text.slice(end)];
  }

  function solution(steps, ending, calculator, wrong) {
    const list = element("ol", "steps");
    steps.forEach(([question, line, computed], index) => {
      const item = element("li", index === wrong ? "wrong-step" : "");
      if (question) item.append(element("p", "subquestion", question));
      if (line) item.append(element("p", "", ...marked(line, computed, calculator)));
      list.append(item);
    });
    if (wrong !== null && wrong >= steps.length) list.append(element("li", "wrong-step missing", "(a step is missing)"));
    return [list, element("p", "ending", ending || "(no answer)")];
  }

  function answer(prediction) {
    const evaluation = data.evaluations[prediction.evaluation];
    const name = element("span", "method", evaluation.label);
    name.style.color = `var(--${variables[evaluation.method]})`;
    const verdict = element("span", `verdict-${prediction.correct ? "right" : "wrong"}`, prediction.correct ? "✓ right" : "✗ wrong");
    const head = element("h3", "", name, ` ${evaluation.model}, ${seedText(evaluation)} `, verdict);
    if (!prediction.correct && prediction.cause) {
      const chip = element("span", "cause", data.causes[prediction.cause]);
      chip.style.setProperty("--cause", `var(--cause-${prediction.cause})`);
      head.append(" ", chip);
    }
    const facts = [`${prediction.tokens} tokens`, evaluation.calculator ? "" : "no calculator",
      evaluation.given ? "sub-questions given" : "", prediction.stopped].filter(Boolean).join(" · ");
    const wrong = prediction.correct ? null : prediction.wrong;
    return element("section", "answer", head, ...solution(prediction.steps, prediction.ending, evaluation.calculator, wrong),
      element("p", "facts", facts));
  }

  function show() {
    const evaluations = new Set(found.map((p) => p.evaluation));
    const shown = [...evaluations].reduce((sum, index) => sum + data.evaluations[index].shown, 0);
    const of = [...evaluations].reduce((sum, index) => sum + data.evaluations[index].of, 0);
    part("count").textContent = found.length
      ? `${at + 1} of ${found.length} that match; the page contains ${shown} of the ${of} answers of these models`
      : "Nothing matches. Take a filter away.";
    part("previous").disabled = at === 0;
    part("next").disabled = at >= found.length - 1;
    part("example").replaceChildren();
    if (!found.length) return;
    const prediction = found[at];
    const problem = data.problems[prediction.problem];
    const gold = element("section", "answer gold", element("h3", "", "Gold"),
      ...solution(problem.steps || [], `#### ${problem.gold}`, true, null));
    if (!problem.steps) gold.append(element("p", "facts", "these predictions were written without the gold steps"));
    const columns = element("div", "columns", gold, answer(prediction));
    const other = byEvaluation.get(`${field("other").value} ${prediction.problem}`);
    if (other && other !== prediction) columns.append(answer(other));
    part("example").append(element("p", "question", problem.question), element("p", "facts", problem.id), columns);
  }

  function page(by) {
    at = Math.max(0, Math.min(found.length - 1, at + by));
    show();
  }

  options(field("problems"), "", [...new Set(data.evaluations.map((e) => e.problems))].map((name) => [name, name]));
  choices();
  root.addEventListener("input", (event) => {
    if (event.target.name === "problems") choices();
    if (event.target.name === "other") show();
    else filter();
  });
  root.querySelector("form").addEventListener("submit", (event) => event.preventDefault());
  part("previous").addEventListener("click", () => page(-1));
  part("next").addEventListener("click", () => page(1));
  document.addEventListener("keydown", (event) => {
    if (event.altKey || event.ctrlKey || event.metaKey) return;
    if (/^(INPUT|SELECT|TEXTAREA)$/.test(event.target.tagName)) {
      if (event.key === "Escape") event.target.blur();
      return;
    }
    const box = root.getBoundingClientRect();
    if (box.bottom < 0 || box.top > window.innerHeight) return; // elsewhere the keys scroll the page
    const by = { ArrowRight: 1, j: 1, ArrowLeft: -1, k: -1 }[event.key];
    if (by) page(by);
    else if (event.key === "/") field("search").focus();
    else return;
    event.preventDefault();
  });
  root.hidden = false;
  filter();
})();
