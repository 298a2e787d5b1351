/* The ledger's page: a search field, and buttons that show one verdict alone. */
document.addEventListener("DOMContentLoaded", () => {
  const ledger = document.querySelector("section#ledger");
  if (!ledger) return;
  const verdicts = [...ledger.querySelectorAll(":scope > section")];
  const name = (verdict) => verdict.querySelector("h2").firstChild.textContent;

  const search = document.createElement("input");
  search.type = "search";
  search.placeholder = "Search the claims";
  search.setAttribute("aria-label", "Search the claims");
  const choice = document.createElement("select");
  choice.setAttribute("aria-label", "Verdict");
  for (const text of ["all verdicts", ...verdicts.map(name)]) choice.add(new Option(text));
  const shown = document.createElement("output");

  function filter() {
    const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
    let count = 0;
    verdicts.forEach((verdict, i) => {
      const chosen = [0, i + 1].includes(choice.selectedIndex);
      let any = false;
      for (const claim of verdict.querySelectorAll(":scope > section")) {
        const text = claim.textContent.toLowerCase();
        claim.hidden = !(chosen && words.every((word) => text.includes(word)));
        any ||= !claim.hidden;
        count += !claim.hidden;
      }
      verdict.hidden = !any;
    });
    shown.textContent = `${count} claims`;
  }

  const bar = document.createElement("p");
  bar.className = "ledger-filter";
  bar.append(search, choice, shown);
  ledger.querySelector("h1").after(bar);
  search.addEventListener("input", filter);
  choice.addEventListener("change", filter);
  filter();
});
