// what the theme leaves out for keyboards and screen readers: names of regions, focus of what scrolls
function nameRegions() {
  document.querySelectorAll(".md-code__nav").forEach((nav, i) => nav.setAttribute("aria-label", `Code ${i + 1}`));
  document.querySelectorAll(".md-nav__item--nested > nav").forEach((nav) => {
    const title = nav.parentElement.querySelector(".md-ellipsis");
    nav.removeAttribute("aria-labelledby");
    if (title) nav.setAttribute("aria-label", title.textContent.trim());
  });
  document.querySelectorAll(".md-nav--secondary nav").forEach((nav) => {
    nav.removeAttribute("aria-label");
    nav.setAttribute("role", "none");
  });
  const scrolled = ".md-typeset__scrollwrap, .highlight-ipynb, .jp-RenderedText pre, math[display=block]";
  document.querySelectorAll(scrolled).forEach((region) => {
    if (region.scrollWidth > region.clientWidth) region.setAttribute("tabindex", "0");
  });
}
window.addEventListener("load", () => setTimeout(nameRegions, 100));
