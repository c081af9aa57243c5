// Starts Swagger UI with the options that FastAPI gives it. In a file of its own, because the page's
// Content-Security-Policy allows no script inside the page.
const place = document.getElementById("swagger-ui");

SwaggerUIBundle({
  url: place.dataset.document,
  dom_id: "#swagger-ui",
  presets: [SwaggerUIBundle.presets.apis],
  layout: "BaseLayout",
  deepLinking: true,
  showExtensions: true,
  showCommonExtensions: true,
  validatorUrl: null, // else a badge from elsewhere
});
