pub mod images;
pub mod mortal;
pub mod turns;
pub mod world;
