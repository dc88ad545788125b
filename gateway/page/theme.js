// A plain script in the head: the theme is there before anything is painted.
try {
  document.documentElement.dataset.theme = localStorage.getItem("theme") ?? "auto";
} catch {
  document.documentElement.dataset.theme = "auto"; // storage is switched off
}
