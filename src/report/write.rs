//! Writes the report of a run to a file.

use std::path::Path;

use super::page::page;
use super::run::RunReport;
use crate::error::{Error, Result};

impl RunReport {
    /// Writes the report: as a page where the name ends in `.html`, as JSON otherwise.
    ///
    /// # Errors
    /// Exit code 5 where the file can't be written.
    pub fn write(&self, path: &Path) -> Result<()> {
        let text = if path.extension().is_some_and(|extension| extension == "html") {
            page(self)
        } else {
            serde_json::to_string_pretty(self).expect("reports are plain data") + "\n"
        };
        std::fs::write(path, text).map_err(|e| {
            Error::run(format!("the output is published, but the report can't be written: {e}"))
                .file(path)
                .fix("choose a directory that you may write to")
        })
    }
}
