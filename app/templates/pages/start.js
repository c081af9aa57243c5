// Starts Swagger UI with the same options as FastAPI. The script is a file of its own, because the
// Content-Security-Policy of the page forbids inline scripts.
const element = document.getElementById("swagger-ui");

SwaggerUIBundle({
  url: element.dataset.document,
  dom_id: "#swagger-ui",
  presets: [SwaggerUIBundle.presets.apis],
  layout: "BaseLayout",
  deepLinking: true,
  showExtensions: true,
  showCommonExtensions: true,
  validatorUrl: null, // no validator badge, which would come from another server
});
