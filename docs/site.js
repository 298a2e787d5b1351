/* The ledger's page: a search field, and a list that shows one verdict alone. */
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

/* A slider over frames that lie below each other in one picture. */
document.addEventListener("DOMContentLoaded", () => {
  for (const place of document.querySelectorAll(".frames")) {
    const labels = place.dataset.labels.split(" ");
    const picture = document.createElement("div");
    picture.className = "picture";
    picture.role = "img";
    picture.ariaLabel = place.dataset.alt;
    picture.style.backgroundImage = `url(${place.dataset.src})`;
    picture.style.backgroundSize = `100% ${100 * labels.length}%`;
    picture.style.aspectRatio = place.dataset.ratio;
    const slider = document.createElement("input");
    slider.type = "range";
    slider.max = labels.length - 1;
    slider.value = place.dataset.first;
    const label = document.createElement("label");
    const text = document.createElement("span");
    label.append(slider, text);

    function show() {
      picture.style.backgroundPositionY = `${(100 * slider.value) / (labels.length - 1)}%`;
      text.textContent = ` ${place.dataset.name} ${labels[slider.value]}`;
    }
    slider.addEventListener("input", show);
    place.replaceChildren(label, picture);
    show();
  }
});
