"use strict";
// One choice of a verdict for all tables of the documents; tables without a row of it are hidden.
// Without this script everything is shown.
{
  const places = [...document.querySelectorAll(".of-document")];
  const rows = [...document.querySelectorAll("tr[data-verdict]")];
  const select = document.getElementById("verdict");
  const count = document.getElementById("verdict-count");
  const apply = () => {
    let left = 0;
    for (const row of rows) {
      const out = select.value !== "" && row.dataset.verdict !== select.value;
      row.classList.toggle("left-out", out);
      if (!out && row.id) left += 1;
    }
    for (const place of places) {
      place.classList.toggle("left-out", !place.querySelector("tr[data-verdict]:not(.left-out)"));
    }
    count.textContent = `${left} shown`;
  };
  select.addEventListener("change", apply);
  document.getElementById("verdict-choice").hidden = false;
  // What an address or a link names is shown, whatever was chosen before.
  const follow = () => {
    const target = document.getElementById(decodeURIComponent(location.hash.slice(1)));
    if (target && target.closest(".left-out")) {
      select.value = "";
      apply();
      target.scrollIntoView({ block: "center" });
    }
  };
  window.addEventListener("hashchange", follow);
  apply();
}
