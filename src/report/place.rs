//! Whether a report can be written, asked before a run begins: what it would say can't be had again afterwards.

use std::fs::{self, OpenOptions};
use std::io::ErrorKind;
use std::path::Path;

use crate::error::{Error, Result};

/// Tries to open the report's file for writing, and leaves no trace. One inside `out`, where the output will be, can't
/// be tried before that is there.
///
/// # Errors
/// Exit code 2 where the path is a directory or has no parent directory; 5 where the file system refuses.
pub fn try_place(path: &Path, out: &Path) -> Result<()> {
    let unusable = |what: &str, fix: &str| Err(Error::usage(format!("--report: {what}")).file(path).fix(fix));
    let Some(name) = path.file_name() else {
        return unusable("this is not a name for a file", "give a path that ends in a file's name");
    };
    let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let Ok(inside) = fs::canonicalize(parent) else {
        // The parent may be OUT itself, which is not there yet.
        let there = parent.parent().filter(|above| !above.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let future =
            fs::canonicalize(there).ok().zip(parent.file_name()).map(|(above, name)| above.join(name));
        if future.is_some_and(|future| future == out) {
            return Ok(());
        }
        return unusable("the parent directory does not exist", "create it first");
    };
    let whole = inside.join(name);
    if path.is_dir() || whole == out {
        return unusable("this is a directory", "give the name of a file");
    }
    // A pipe or a terminal would take what is tried for the report.
    if inside == out || (path.exists() && !path.is_file()) {
        return Ok(());
    }
    let is_new = matches!(fs::symlink_metadata(path), Err(e) if e.kind() == ErrorKind::NotFound);
    let opened = OpenOptions::new().append(true).create(true).open(path);
    opened.map_err(|e| {
        Error::run(format!("--report: can't write: {e}"))
            .file(path)
            .fix("choose a directory that you may write to")
    })?;
    if is_new {
        let _ = fs::remove_file(path);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::ExitCode;

    #[test]
    fn places_that_are_no_use_are_refused_and_others_left_as_they_are() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        let tried = |name: &str| try_place(&at(name), &at("out")).map_err(|error| error.exit);
        fs::write(at("old.json"), "kept").unwrap();
        fs::create_dir(at("folder")).unwrap();
        for good in ["new.json", "old.json", "folder/new.html", "out/report.json"] {
            assert_eq!(tried(good), Ok(()), "{good}");
        }
        for wrong in ["folder", "no/report.json", "no/out/report.json", "out", ".."] {
            assert_eq!(tried(wrong), Err(ExitCode::Usage), "{wrong}");
        }
        assert_eq!(fs::read_to_string(at("old.json")).unwrap(), "kept");
        assert!(!at("new.json").exists() && !at("folder/new.html").exists());
        std::os::unix::fs::symlink("/proc/no/such", at("link")).unwrap();
        assert_eq!(tried("link"), Err(ExitCode::Run));
        fs::create_dir(at("out")).unwrap();
        assert_eq!(tried("out/report.json"), Ok(()));
    }
}
