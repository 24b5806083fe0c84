
(() => {
  "use strict";
  const root = document.currentScript.parentElement;
  const data = JSON.parse(root.querySelector('script[type="application/json"]').textContent);
  const patterns = data.patterns.map((text) => Uint8Array.from(atob(text), (c) => c.charCodeAt(0)));
  const tokens = Array.from(root.querySelectorAll(".strip .token"));
  const select = root.querySelector("select");
  const output = root.querySelector("output");
  let query = data.start;

  const attention = (key) => {
    if (!data.causal) return patterns[select.value][query * data.size + key] / 255;
    return key > query ? 0 : patterns[select.value][(query * (query + 1)) / 2 + key] / 255;
  };
  const quoted = (i) => "“" + tokens[i].textContent + "” (" + i + ")";

  function show() {
    const targets = new Set(data.targets[query] || []);
    tokens.forEach((token, key) => {
      const a = attention(key);
      token.style.setProperty("--a", a.toFixed(3));
      token.classList.toggle("mid", a > 0.6);
      token.classList.toggle("high", a > 0.8);
      token.classList.toggle("target", targets.has(key));
      token.classList.toggle("query", key === query);
      token.tabIndex = key === query ? 0 : -1;
    });
    const most = tokens.map((_, key) => key).filter((key) => attention(key) >= 0.01);
    most.sort((one, other) => attention(other) - attention(one));
    const listed = most.slice(0, 4).map((key) => quoted(key) + " " + attention(key).toFixed(2));
    output.textContent = "from " + quoted(query) + " to " + (listed.join(", ") || "no token much");
  }
  function move(event) {
    const token = event.target.closest("[data-i]");
    if (!token) return;
    query = Number(token.dataset.i);
    show();
  }
  const strip = root.querySelector(".strip");
  for (const kind of ["pointerover", "click", "focusin"]) strip.addEventListener(kind, move);
  strip.addEventListener("keydown", (event) => {
    const steps = { ArrowLeft: -1, ArrowUp: -1, ArrowRight: 1, ArrowDown: 1 };
    const to = query + (steps[event.key] || 0);
    if (to === query || !tokens[to]) return;
    event.preventDefault();
    tokens[to].focus();
  });
  select.addEventListener("change", show);
  select.value = "0"; // some browsers keep what was chosen before a reload
  show();
})();
