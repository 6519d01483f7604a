// Loaded before the first paint, so that a chosen look never flashes: "light", "dark", or "" for the system's.
try {
  document.documentElement.dataset.theme = localStorage.getItem("openm3.theme") ?? "";
} catch {
  // A browser that keeps nothing shows the system's.
}
