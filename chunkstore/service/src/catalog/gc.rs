//! Garbage collection: what lives is copied out of retired roots, and roots are deleted whole.
//!
//! A pass may end at any point, and be repeated; passes of several instances may overlap. Each step
//! leaves a state in which every live manifest has a document, and the chunks that it names are in the
//! document's own root.

use std::time::Duration;

use lazyimg_convergent::Digest;

use crate::engine::{EngineError, RootId, When};

use super::chunks::{Right, Verified};
use super::images::{TRIES, check_copy, parse, parse_name};
use super::names::{self, ManifestName, Mark};
use super::roots::RootView;
use super::types::{GcOptions, GcReport, GcRoot, RootState, Stuck};
use super::{Catalog, CatalogError, DEFAULT_GRACE};

/// Manifests that are listed at once.
const PAGE: usize = 256;

/// What one pass knows.
struct Pass {
    options: GcOptions,
    verified: Verified,
}

/// What became of one manifest.
enum Moved {
    /// It is in the active root.
    Yes,
    /// It was deleted or moved by somebody else meanwhile.
    Gone,
    /// Nobody has asked for it in too long.
    Dropped,
    /// So many of its chunks can't be had.
    Stuck(u64),
}

impl Catalog {
    /// One pass over all roots but the active one.
    ///
    /// # Errors
    /// [`CatalogError::GcUnderWay`], [`CatalogError::Engine`], [`CatalogError::RootsMove`]. What was done
    /// is done; the next pass goes on.
    pub async fn gc(&self, options: GcOptions) -> Result<GcReport, CatalogError> {
        let _pass = self
            .gc_pass
            .try_lock()
            .map_err(|_| CatalogError::GcUnderWay)?;
        if !options.dry_run {
            self.say_retired().await?;
        }
        let view = self.fresh_view().await?;
        if !options.dry_run {
            for (root, mark) in &view.leftovers {
                self.engine.delete_doc(&names::mark(*root, *mark)).await?;
            }
        }
        let pass = Pass {
            options,
            verified: Verified::default(),
        };
        let mut report = GcReport {
            dry_run: options.dry_run,
            roots: Vec::new(),
        };
        for root in view.all() {
            let mut line = GcRoot {
                root: root.id,
                before: root.state,
                after: Some(root.state),
                alarm: root.alarm && !root.ignored,
                error: None,
                wait_seconds: 0,
                manifests_moved: 0,
                manifests_dropped: 0,
                chunks_copied: 0,
                bytes_copied: 0,
                stuck: Vec::new(),
            };
            let done = match root.state {
                RootState::Active => continue,
                RootState::Retired => self.gc_retired(root, &pass, &mut line).await,
                RootState::Expired => self.gc_expired(root, &pass, &mut line).await,
                RootState::Deleting => self.gc_deleting(root, &pass, &mut line).await,
            };
            match done {
                Ok(()) => {}
                // Nothing works, and to try it for each root would take long.
                Err(error @ CatalogError::Engine(EngineError::Unavailable(_))) => {
                    return Err(error);
                }
                Err(error) => {
                    tracing::error!(root = %line.root, %error, "this root can't be collected");
                    line.error = Some(error.to_string());
                }
            }
            tracing::info!(
                root = %line.root, before = %line.before, after = ?line.after, alarm = line.alarm,
                wait_seconds = line.wait_seconds, moved = line.manifests_moved,
                dropped = line.manifests_dropped, copied = line.chunks_copied,
                stuck = line.stuck.len(), dry_run = options.dry_run, "garbage collection"
            );
            report.roots.push(line);
        }
        if !options.dry_run {
            self.fresh_view().await?;
            match self.recount().await {
                Ok(()) => {}
                Err(error @ CatalogError::Engine(EngineError::Unavailable(_))) => {
                    return Err(error);
                }
                Err(error) => {
                    tracing::error!(%error, "what tenants use was not counted anew");
                }
            }
        }
        Ok(report)
    }

    /// How long it is yet until `length` has passed since a mark; the whole time if there is none.
    async fn wait(&self, root: RootId, mark: Mark, length: Duration) -> Result<u64, CatalogError> {
        let length: u64 = length.as_millis().try_into().unwrap_or(u64::MAX);
        let Some(since) = self.marked_at(root, mark).await? else {
            return Ok(length.div_ceil(1000));
        };
        let end = since.saturating_add(length);
        Ok(end.saturating_sub(self.now_ms()).div_ceil(1000))
    }

    async fn gc_retired(
        &self,
        root: &RootView,
        pass: &Pass,
        line: &mut GcRoot,
    ) -> Result<(), CatalogError> {
        line.wait_seconds = self
            .wait(root.id, Mark::Retired, self.options.settle)
            .await?;
        if line.wait_seconds > 0 {
            return Ok(());
        }
        if self.move_all(root.id, pass, line).await? && !pass.options.dry_run {
            self.mark(root.id, Mark::Expired).await?;
            line.after = Some(RootState::Expired);
        }
        Ok(())
    }

    async fn gc_expired(
        &self,
        root: &RootView,
        pass: &Pass,
        line: &mut GcRoot,
    ) -> Result<(), CatalogError> {
        // Nothing should live here. But if something does, it is not what GC thinks that counts.
        if !self.move_all(root.id, pass, line).await? || line.alarm {
            return Ok(());
        }
        let grace = pass
            .options
            .grace_seconds
            .map_or(DEFAULT_GRACE, Duration::from_secs);
        // Instances may take it for retired for a while, and then raise no alarm.
        let length = grace.max(self.options.settle);
        line.wait_seconds = self.wait(root.id, Mark::Expired, length).await?;
        if self
            .has_doc(names::mark(root.id, Mark::Acknowledged))
            .await?
        {
            let since = self.wait(root.id, Mark::Acknowledged, length).await?;
            line.wait_seconds = line.wait_seconds.max(since);
        }
        if line.wait_seconds > 0 || pass.options.dry_run {
            return Ok(());
        }
        line.alarm = self.is_stopped(root.id).await?;
        if !line.alarm {
            self.mark(root.id, Mark::Deleting).await?;
            line.after = Some(RootState::Deleting);
        }
        Ok(())
    }

    /// Whether an alarm stops a root's deletion.
    async fn is_stopped(&self, root: RootId) -> Result<bool, CatalogError> {
        let marks = [Mark::Alarm, Mark::Ignored].map(|mark| names::mark(root, mark));
        let there = self.engine.has_docs(&marks).await?;
        Ok(matches!(there[..], [true, false]))
    }

    async fn gc_deleting(
        &self,
        root: &RootView,
        pass: &Pass,
        line: &mut GcRoot,
    ) -> Result<(), CatalogError> {
        line.wait_seconds = self
            .wait(root.id, Mark::Deleting, self.options.settle)
            .await?;
        if line.wait_seconds > 0 || pass.options.dry_run {
            return Ok(());
        }
        // After the mark, and read anew: see `raise_alarm`.
        line.alarm = self.is_stopped(root.id).await?;
        if line.alarm {
            return Ok(());
        }
        self.engine.remove_chunks(root.id).await?;
        self.engine.remove_docs(&names::held(root.id)).await?;
        for mark in Mark::ALL {
            self.engine.delete_doc(&names::mark(root.id, mark)).await?;
        }
        line.after = None;
        Ok(())
    }

    /// Moves what lives out of a root; true when nothing is left there.
    async fn move_all(
        &self,
        root: RootId,
        pass: &Pass,
        line: &mut GcRoot,
    ) -> Result<bool, CatalogError> {
        let prefix = names::manifests(root);
        let mut after: Option<String> = None;
        loop {
            let page = self
                .engine
                .list_docs(&prefix, after.as_deref(), PAGE)
                .await?;
            let last = page.len() < PAGE;
            after = page.last().cloned().or(after);
            for name in page {
                let name = match parse_name(name) {
                    Ok(name) => name,
                    Err(error) => {
                        // It keeps its root: nobody knows what it is.
                        tracing::error!(%error, "a document among the manifests is none");
                        line.error = Some(error.to_string());
                        continue;
                    }
                };
                match self.move_one(&name, pass, line).await? {
                    Moved::Yes => line.manifests_moved += 1,
                    Moved::Dropped => line.manifests_dropped += 1,
                    Moved::Gone => {}
                    Moved::Stuck(chunks) => {
                        tracing::error!(
                            manifest = %name, chunks,
                            "a live image can't be moved: chunks of it are gone or damaged. Its root \
                             stays until they are put again, or the image is deleted"
                        );
                        line.stuck.push(Stuck {
                            tenant: name.tenant,
                            image: name.image,
                            key: name.key,
                            chunks,
                        });
                    }
                }
            }
            if last {
                break;
            }
        }
        Ok(self.engine.list_docs(&prefix, None, 1).await?.is_empty())
    }

    async fn move_one(
        &self,
        name: &ManifestName,
        pass: &Pass,
        line: &mut GcRoot,
    ) -> Result<Moved, CatalogError> {
        let origin = name.to_string();
        let options = &pass.options;
        if self.is_unused(name, options.unused_seconds).await? {
            if !options.dry_run {
                let _one_changes = self.images.lock((name.tenant.clone(), name.image)).await;
                if !self.has_doc(origin.clone()).await? {
                    return Ok(Moved::Gone);
                }
                self.engine.delete_doc(&origin).await?;
                self.count_moved(name);
            }
            return Ok(Moved::Dropped);
        }
        if options.dry_run {
            return Ok(Moved::Yes);
        }
        let bytes = match self.engine.get_doc(&origin).await {
            Ok(Some(bytes)) => bytes,
            Ok(None) => return Ok(Moved::Gone),
            Err(EngineError::Damaged(why)) => {
                tracing::warn!(manifest = %name, why, "this manifest is damaged");
                return Ok(Moved::Stuck(0));
            }
            Err(error) => return Err(error.into()),
        };
        if check_copy(name, &bytes).is_err() {
            return Ok(Moved::Stuck(0));
        }
        let Ok(parsed) = parse(bytes.clone()).await else {
            return Ok(Moved::Stuck(0));
        };
        let mut view = self.fresh_view().await?;
        for _ in 0..TRIES {
            let active = view.active()?;
            let brought = self
                .bring(
                    &view,
                    &name.tenant,
                    &parsed.chunks,
                    Right::Live(&pass.verified),
                )
                .await?;
            line.chunks_copied += brought.copied;
            line.bytes_copied += brought.copied_bytes;
            if !brought.is_complete() {
                let now = self.fresh_view().await?;
                if now.active()? != active {
                    self.clean_up_if_gone(&now, active).await?;
                    view = now;
                    continue;
                }
                // Or another pass has moved it, and the root with its chunks is gone.
                if !self.has_doc(origin.clone()).await? {
                    return Ok(Moved::Gone);
                }
                return Ok(Moved::Stuck(brought.missing.len().max(1) as u64));
            }
            // Whoever deletes the image counts what it had: with the same lock.
            let _one_changes = self.images.lock((name.tenant.clone(), name.image)).await;
            self.copy_profiles(name.root, active, &name.tenant, &name.image)
                .await?;
            let copy = self.copy_name(active, name);
            let doc = copy.to_string();
            self.engine
                .put_doc(&doc, bytes.clone(), When::Always)
                .await?;
            let now = self.fresh_view().await?;
            if now.active()? != active {
                self.engine.delete_doc(&doc).await?;
                self.clean_up_if_gone(&now, active).await?;
                view = now;
                continue;
            }
            // Whoever deletes the image looks for copies in newer roots after the origin is gone: so
            // either the origin is gone now, or the copy will be found.
            if !self.has_doc(origin.clone()).await? {
                self.engine.delete_doc(&doc).await?;
                return Ok(Moved::Gone);
            }
            self.engine.delete_doc(&origin).await?;
            let len = i64::from(name.version.len);
            self.usage.add(active, &name.tenant, len);
            self.count_moved(name);
            return Ok(Moved::Yes);
        }
        Err(CatalogError::RootsMove)
    }

    /// Counts that a manifest is no more where it was.
    fn count_moved(&self, name: &ManifestName) {
        let len = i64::from(name.version.len);
        self.usage.add(name.root, &name.tenant, -len);
    }

    async fn is_unused(
        &self,
        name: &ManifestName,
        unused_seconds: Option<u64>,
    ) -> Result<bool, CatalogError> {
        let Some(seconds) = unused_seconds else {
            return Ok(false);
        };
        let image: &Digest = &name.image;
        let last = match self.last_used(&name.tenant, image).await {
            Ok(last) => last.unwrap_or(0),
            // Nobody knows: so it was.
            Err(error) if error.is_damage() => return Ok(false),
            Err(error) => return Err(error),
        };
        let last = last.max(name.version.stamp);
        Ok(last.saturating_add(seconds.saturating_mul(1000)) < self.now_ms())
    }
}
