use super::*;

fn file() -> Inode {
    Inode {
        meta: Meta::default(),
        kind: Kind::File {
            size: 0,
            content: None,
        },
        layer: 0,
    }
}

fn dir() -> Inode {
    Inode {
        meta: Meta::implied_dir(),
        kind: Kind::Dir(BTreeMap::new()),
        layer: 0,
    }
}

fn paths(tree: &Tree) -> Vec<String> {
    let mut walk = tree.walk();
    let mut out = Vec::new();
    while let Some((path, _)) = walk.next_entry() {
        out.push(String::from_utf8_lossy(path).into_owned());
    }
    out
}

#[test]
fn a_walk_is_depth_first_in_byte_order_and_begins_with_the_root() {
    let mut tree = Tree::new();
    let b = tree.insert(tree.root(), b"b".to_vec(), dir());
    tree.insert(tree.root(), b"a".to_vec(), file());
    tree.insert(tree.root(), b"b.c".to_vec(), file());
    tree.insert(b, b"z".to_vec(), file());
    let sub = tree.insert(b, b"x".to_vec(), dir());
    tree.insert(sub, b"y".to_vec(), file());
    assert_eq!(paths(&tree), ["", "a", "b", "b/x", "b/x/y", "b/z", "b.c"]);
    assert_eq!(tree.lookup(b"/b/./x//y"), tree.child(sub, b"y"));
    assert_eq!(tree.lookup(b""), Some(tree.root()));
}

#[test]
fn link_counts_follow_names_and_subdirectories() {
    let mut tree = Tree::new();
    let root = tree.root();
    let d = tree.insert(root, b"d".to_vec(), dir());
    let f = tree.insert(root, b"f".to_vec(), file());
    tree.link(d, b"g".to_vec(), f);
    assert_eq!((tree.nlink(root), tree.nlink(d), tree.nlink(f)), (3, 2, 2));
    tree.link(d, b"g".to_vec(), f);
    assert_eq!(tree.nlink(f), 2, "the same link again changes nothing");
    assert_eq!(tree.inode_count(), 3);
    assert!(tree.remove(root, b"d"));
    assert_eq!((tree.nlink(root), tree.nlink(f)), (2, 1));
    assert_eq!(tree.inode_count(), 2);
    assert!(!tree.remove(root, b"d"));
    assert!(tree.try_get(d).is_none());
}

#[test]
fn a_new_inode_under_a_name_leaves_the_other_links_of_the_old_one_alone() {
    let mut tree = Tree::new();
    let root = tree.root();
    let f = tree.insert(root, b"f".to_vec(), file());
    tree.link(root, b"g".to_vec(), f);
    let new = tree.insert(root, b"f".to_vec(), file());
    assert_ne!(new, f);
    assert_eq!(tree.child(root, b"g"), Some(f));
    assert_eq!(tree.nlink(f), 1);
}

#[test]
fn a_very_deep_tree_is_walked_and_dropped_without_recursion() {
    let mut tree = Tree::new();
    let mut at = tree.root();
    for _ in 0..20_000 {
        at = tree.insert(at, b"d".to_vec(), dir());
    }
    assert_eq!(paths(&tree).len(), 20_001);
    assert!(tree.remove(tree.root(), b"d"));
    assert_eq!(tree.inode_count(), 1);
}

#[test]
fn an_inode_stays_small_enough_for_millions_of_them() {
    assert!(size_of::<Slot>() <= 104, "{}", size_of::<Slot>());
}
