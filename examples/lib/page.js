// What the page does in the browser alone: it seeks the player, refuses files that are too large before they are sent,
// and says so if a video cannot be played.
(() => {
    const find = (selector) => document.querySelector(selector);

    // A moment: show it in the player.
    document.addEventListener("click", (event) => {
        const moment = event.target.closest?.("[data-seconds]");
        const video = find("#player video");
        if (!moment || !video) return;
        video.pause();
        video.currentTime = Number(moment.dataset.seconds);
        video.scrollIntoView({ block: "nearest", behavior: "smooth" });
    });

    // A file for the zone, chosen or dropped.
    const check = (event) => {
        if (!event.target.closest?.("#zone")) return;
        const note = find("#too-large");
        const file = (event.dataTransfer ?? event.target).files?.[0];
        const limit = Number(note.dataset.megabytes);
        note.hidden = true;
        if (!file || file.size <= limit * 1e6) return;
        const megabytes = Math.ceil(file.size / 1e6).toLocaleString("en");
        note.textContent = `${file.name} has ${megabytes} MB; the limit is ${limit.toLocaleString("en")} MB.`;
        note.hidden = false;
        event.preventDefault();
        event.stopImmediatePropagation();
        if (!event.dataTransfer) event.target.value = "";
    };
    document.addEventListener("change", check, true);
    document.addEventListener("drop", check, true);

    // Telephones then offer their videos.
    document.addEventListener("click", (event) => {
        const input = event.target.closest?.("#zone") && find("#zone input[type=file]");
        if (input) input.accept = "video/*,.mkv,.ts,.flv";
    }, true);

    document.addEventListener("error", (event) => {
        if (!event.target.matches?.("#player video")) return;
        event.target.hidden = true;
        event.target.nextElementSibling.hidden = false;
    }, true);
})();
